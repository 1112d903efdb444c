"""Downloads from a server on this machine, and archives: what goes on, and what is refused."""

import hashlib
import io
import json
import stat
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from experiments.text import OFFICIAL, babistories, fetch, official, tinystories
from experiments.text.__main__ import main
from experiments.text.archive import extract
from experiments.text.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; what can go wrong on a server can be asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.etag: str | None = '"one"'
        self.ranges, self.lengths = True, True
        self.cut: int | None = None  # bytes after which the connection breaks
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        if self.path not in server.files:
            return self.send_error(404)
        content, start = server.files[self.path], 0
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.cut])
        return None

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def broken_off(server, path) -> None:
    """Leave a part of the file behind."""
    server.cut = 300_000
    with pytest.raises(OSError, match=r"broke off after 300,000 of 1,048,576 bytes; the next call"):
        download(f"{server.url}/file", path, sha256=SHA256)
    server.cut = None
    assert names(path.parent) == {f"{path.name}.part", f"{path.name}.part.version"}
    server.asked.clear()


# Downloads


def test_download(server, tmp_path):
    seen = []
    path = tmp_path / "new" / "file"
    found = download(f"{server.url}/file", path, report=lambda *both: seen.append(both))
    assert found == path and path.read_bytes() == CONTENT
    assert names(path.parent) == {"file"}
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    # Once it is there, nobody is asked.
    server.asked.clear()
    download(f"{server.url}/file", path, sha256=SHA256)
    assert server.asked == []


def test_it_goes_on(server, tmp_path):
    path = tmp_path / "file"
    broken_off(server, path)
    seen = []
    download(f"{server.url}/file", path, sha256=SHA256, report=lambda *both: seen.append(both))
    assert server.asked == [("/file", "bytes=300000-")]
    assert seen[0] == (300_000, len(CONTENT))
    assert path.read_bytes() == CONTENT and names(tmp_path) == {"file"}


def test_it_goes_on_more_than_once(server, tmp_path):
    path = tmp_path / "file"
    broken_off(server, path)
    for done in (600_000, 900_000):
        server.cut = 300_000
        with pytest.raises(OSError, match=f"after {done:,} of"):
            download(f"{server.url}/file", path)
    server.cut = None
    assert download(f"{server.url}/file", path, sha256=SHA256).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [f"bytes={n}-" for n in (300000, 600000, 900000)]


def test_it_starts_again_where_the_file_has_changed(server, tmp_path):
    path = tmp_path / "file"
    broken_off(server, path)
    server.etag, server.files["/file"] = '"two"', CONTENT[::-1]
    assert download(f"{server.url}/file", path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("how", ["no ranges", "no version", "weak version"])
def test_it_starts_again_where_the_server_cannot_go_on(how, server, tmp_path):
    path = tmp_path / "file"
    server.ranges = how != "no ranges"
    server.etag = {"no version": None, "weak version": 'W/"one"'}.get(how, '"one"')
    broken_off(server, path)
    assert download(f"{server.url}/file", path, sha256=SHA256).read_bytes() == CONTENT
    assert [asked is None for _, asked in server.asked] == [how != "no ranges"]


def test_only_the_name_was_missing(server, tmp_path):
    path = tmp_path / "file"
    broken_off(server, path)
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download(f"{server.url}/file", path, sha256=SHA256).read_bytes() == CONTENT


def test_unknown_length(server, tmp_path):
    server.lengths = False
    seen = []
    download(f"{server.url}/file", tmp_path / "f", report=lambda *both: seen.append(both))
    assert (tmp_path / "f").read_bytes() == CONTENT and seen[-1] == (len(CONTENT), None)


def test_wrong_checksum(server, tmp_path):
    server.files["/file"] = b"something else"
    with pytest.raises(ValueError, match=f"file: expected the SHA-256 {SHA256}.*been discarded"):
        download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    assert not (tmp_path / "file").exists() and not (tmp_path / "file.part").exists()
    server.files["/file"] = CONTENT
    download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    # A file that was there before is the user's.
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="Move it away"):
        download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_no_such_file(server, tmp_path):
    with pytest.raises(OSError, match=r"the server answered 404.*none"):
        download(f"{server.url}/none", tmp_path / "none")
    broken_off(server, tmp_path / "file")
    del server.files["/file"]
    with pytest.raises(OSError, match="404"):
        download(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:300_000]


def test_no_server(tmp_path):
    with Server() as gone:
        url = gone.url
    with pytest.raises(OSError, match=r"cannot be fetched: .*http://127"):
        download(f"{url}/file", tmp_path / "file", timeout=5)
    with pytest.raises(ValueError, match="url: expected http or https, got 'file:///etc/hosts'"):
        download("file:///etc/hosts", tmp_path / "file")


def test_two_processes(server, tmp_path):
    # A lock of another open file counts as another process's.
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "file.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is fetching this"):
            download(f"{server.url}/file", tmp_path / "file")
    assert server.asked == []
    assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT


def test_no_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="1,048,576 bytes to come, 10 are free"):
        download(f"{server.url}/file", tmp_path / "file")


# The official data sets


def test_what_to_do_without_the_data(tmp_path):
    for name, read in (("tinystories", tinystories), ("babistories", babistories)):
        with pytest.raises(
            ValueError, match=rf"python -m experiments.text fetch {name} {tmp_path}"
        ):
            read(tmp_path)
        assert names(tmp_path) == set()
    (tmp_path / "TinyStories-train.txt").write_text("a")
    with pytest.raises(ValueError, match=r"folder: expected TinyStories-valid.txt in"):
        tinystories(tmp_path)
    with pytest.raises(ValueError, match="name: expected one of tinystories, babistories"):
        fetch("wikipedia", tmp_path)


def test_files_that_are_there(tmp_path):
    (tmp_path / "TinyStories-train.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    (tmp_path / "TinyStories-valid.txt").write_text("Three.\n")
    data = tinystories(tmp_path)
    assert (list(data.train), list(data.validation)) == (["One.", "Two."], ["Three."])
    for name, texts in (("traindataset.txt", ["One.", "T\nwo."]), ("valdataset.txt", ["Three."])):
        (tmp_path / name).write_text("".join(json.dumps(text) + "\n" for text in texts))
    data = babistories(tmp_path)
    assert (list(data.train), list(data.validation)) == (["One.", "T\nwo."], ["Three."])
    # All is there: nothing is fetched.
    assert fetch("babistories", tmp_path, mirror="http://127.0.0.1:9") == tmp_path


def test_fetch_tinystories(server, tmp_path, monkeypatch, capsys):
    files = {"TinyStories-train.txt": b"One.\n<|endoftext|>\n", "TinyStories-valid.txt": b"Two."}
    server.files = {f"/data/{name}": content for name, content in files.items()}
    command = ["fetch", "tinystories", str(tmp_path), "--mirror", f"{server.url}/data"]
    # They are not the real ones.
    assert main(command) == 2
    assert "expected the SHA-256 c5cf5e22" in capsys.readouterr().err
    assert list(tmp_path.glob("*.txt")) == []
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, digest in sums.items():
        monkeypatch.setitem(OFFICIAL["tinystories"].files, name, digest)
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "TinyStories-train.txt: 0.0 of 0.0 MB, 100%" in printed.err and printed.out == ""
    assert list(tinystories(tmp_path).train) == ["One."]


def test_broken_off_on_the_command_line(server, tmp_path, capsys):
    server.files = {"/TinyStories-train.txt": CONTENT}
    server.cut = 1000
    assert main(["fetch", "tinystories", str(tmp_path), "--mirror", server.url]) == 2
    assert (
        "broke off after 1,000 of 1,048,576 bytes; the next call goes on" in capsys.readouterr().err
    )


def test_tell(capsys):
    assert main(["tell", "--count", "2"]) == 0
    first = capsys.readouterr().out
    assert main(["tell", "--count", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out != first and first.count("\n\n") == 1
    assert main(["tell", "--seed", "-1"]) == 2
    assert "seed: expected 0 or more" in capsys.readouterr().err


# Archives


def test_without_py7zr(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(ValueError, match=r"pip install py7zr.*7z x x.7z.001"):
        extract([tmp_path / "x.7z.001"], ["a"], tmp_path, most=9)


@pytest.fixture
def py7zr():
    return pytest.importorskip("py7zr", reason="unpacking needs py7zr")


def archive(py7zr, folder, members: dict[str, bytes], part: int = 400):
    """Pack members, and split the archive."""
    whole = io.BytesIO()
    with py7zr.SevenZipFile(whole, "w") as file:
        for name, content in members.items():
            file.writestr(content, name)
    return split(whole.getvalue(), folder, part)


def split(content: bytes, folder, part: int = 400):
    folder.mkdir(exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, len(content), part), start=1):
        parts.append(folder / f"x.7z.{number:03d}")
        parts[-1].write_bytes(content[start : start + part])
    return parts


NOISE = hashlib.shake_256(b"").digest(3000)


def test_named_files_and_nothing_else(py7zr, tmp_path):
    members = {"data/a.txt": b"first " + NOISE, "b.txt": b"second", "evil.sh": b"rm", "empty": b""}
    parts = archive(py7zr, tmp_path / "in", members)
    assert len(parts) > 5
    found = extract(parts, ["a.txt", "b.txt"], tmp_path / "out", most=4000)
    assert [path.read_bytes() for path in found] == [b"first " + NOISE, b"second"]
    assert names(tmp_path / "out") == {"a.txt", "b.txt"}
    assert names(tmp_path) == {"in", "out"}


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (["none.txt"], "expected one file none.txt"),
        (["twice.txt"], "expected one file twice.txt"),
        (["folder"], "expected one file folder"),
        (["a.txt"], "most: expected a.txt of at most 10 bytes, got 20"),
        (["link"], "expected one file link"),
    ],
)
def test_what_is_refused(wanted, word, py7zr, tmp_path):
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    for name in ("a.txt", "twice.txt", "folder/twice.txt"):
        (source / name).write_bytes(b"x" * 20)
    (source / "link").symlink_to("a.txt")
    whole = io.BytesIO()
    with py7zr.SevenZipFile(whole, "w") as file:
        for name in ("folder", "a.txt", "twice.txt", "folder/twice.txt", "link"):
            file.write(source / name, name)
    parts = split(whole.getvalue(), tmp_path / "in")
    with pytest.raises(ValueError, match=word):
        extract(parts, wanted, tmp_path / "out", most=10)
    assert names(tmp_path / "out") == set()


def test_paths_that_lead_out(py7zr, tmp_path, monkeypatch):
    # py7zr does not write such names, so they are put into what it has read.
    parts = archive(py7zr, tmp_path / "in", {"inside/a.txt": b"text"})

    def pretend(name: str) -> None:
        monkeypatch.setattr(py7zr.py7zr.ArchiveFile, "filename", property(lambda self: name))

    pretend("../../a.txt")
    with pytest.raises(ValueError, match="expected a whole 7z archive, got Bad7zFile"):
        extract(parts, ["a.txt"], tmp_path / "out", most=10)
    assert names(tmp_path / "out") == set()
    pretend(f"{tmp_path}/a.txt")
    extract(parts, ["a.txt"], tmp_path / "out", most=10)
    assert names(tmp_path / "out") == {"a.txt"} and names(tmp_path) == {"in", "out"}


@pytest.mark.parametrize("where", [0, 40, 2500, -20])
def test_damaged_archives(where, py7zr, tmp_path):
    parts = archive(py7zr, tmp_path / "in", {"a.txt": NOISE * 2}, part=10**6)
    content = bytearray(parts[0].read_bytes())
    content[where] ^= 0x55
    parts[0].write_bytes(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"001: expected a whole 7z archive, got"):
        extract(parts, ["a.txt"], tmp_path / "out", most=10**6)
    assert names(tmp_path / "out") == {"a.txt"}
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"old"


def test_missing_parts(py7zr, tmp_path):
    parts = archive(py7zr, tmp_path / "in", {"a.txt": NOISE})
    parts[2].unlink()
    with pytest.raises(ValueError, match=r"parts: expected \d files, got no .*x.7z.003"):
        extract(parts, ["a.txt"], tmp_path / "out", most=10**6)


def test_more_than_the_archive_says(py7zr, tmp_path, monkeypatch):
    parts = archive(py7zr, tmp_path / "in", {"a.txt": NOISE})
    monkeypatch.setattr("experiments.text.archive._find", lambda members, name, most: name)
    with pytest.raises(ValueError, match="most: expected fewer bytes"):
        extract(parts, ["a.txt"], tmp_path / "out", most=100)
    assert names(tmp_path / "out") == set()


def test_fetch_babistories(py7zr, server, tmp_path):
    lines = {"traindataset.txt": ["One.", NOISE.hex()], "valdataset.txt": ["Two."]}
    members = {
        name: "".join(json.dumps(text) + "\n" for text in texts).encode()
        for name, texts in lines.items()
    }
    parts = archive(py7zr, tmp_path / "in", members, part=800)
    assert len(parts) == 5 == len(OFFICIAL["babistories"].files)
    files = zip(OFFICIAL["babistories"].files, parts, strict=True)
    server.files = {f"/{name}": part.read_bytes() for name, part in files}
    fetch("babistories", tmp_path / "out", mirror=server.url)
    data = official.babistories(tmp_path / "out")
    assert (list(data.train), list(data.validation)) == (list(lines["traindataset.txt"]), ["Two."])
    assert stat.S_IMODE((tmp_path / "out" / "valdataset.txt").stat().st_mode) & 0o444

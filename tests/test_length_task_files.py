"""The authors' files of the length-generalisation tasks: reading, writing, and what is refused."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.length_tasks import MQMTAR, Copy, Reverse, Sample, Sort, files
from experiments.length_tasks.files import Lines, SampleFiles, write_samples


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    drawn = [MQMTAR().sample(0, "test", index) for index in range(20)]
    assert write_samples(tmp_path / "test_0_64", iter(drawn)) == 20
    ends = (".src", ".src.idx", ".trg", ".trg.idx")
    assert names(tmp_path) == sorted(f"test_0_64{end}" for end in ends)
    found = SampleFiles(tmp_path / "test_0_64")
    assert len(found) == 20
    for index in reversed(range(20)):
        assert found[index].source.dtype == np.int32
        assert found[index].source.tolist() == drawn[index].source.tolist()
        assert found[index].target.tolist() == drawn[index].target.tolist()
    first = (tmp_path / "test_0_64.trg").read_text().split("\n")[0]
    assert first == " ".join(map(str, drawn[0].target))


def test_padding_is_not_written(tmp_path):
    write_samples(tmp_path / "a", [Sample(np.array([1, 2, 9]), 2, np.array([3, 9]), 1)])
    assert (tmp_path / "a.src").read_text() == "1 2\n"
    assert (tmp_path / "a.trg").read_text() == "3\n"


@pytest.mark.parametrize("chunk", [1, 3, 7, 2**22])
def test_index_is_made_on_first_use(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = write(tmp_path / "train.src", "1 2\n3\n40 50 60\n7\n")
    starts = [0, 4, 6, 15]
    lines = Lines(path)
    assert [line.tolist() for line in lines] == [[1, 2], [3], [40, 50, 60], [7]]
    index = tmp_path / "train.src.idx"
    assert index.read_bytes() == b"".join(start.to_bytes(8, "little") for start in starts)
    made = index.stat().st_mtime_ns
    assert Lines(path)[2].tolist() == [40, 50, 60]
    assert index.stat().st_mtime_ns == made
    assert names(tmp_path) == ["train.src", "train.src.idx"]


def test_index_stays_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path / "train.src", "1 2\n3\n")

    def refuse(source, target):
        raise PermissionError(f"cannot write {target}")

    monkeypatch.setattr(os, "replace", refuse)
    assert [line.tolist() for line in Lines(path)] == [[1, 2], [3]]
    assert names(tmp_path) == ["train.src"]


@pytest.mark.parametrize(
    "line", ["", " ", "1  2", " 1", "1 ", "1\t2", "a", "-1", "+1", "01", "1.0", "1_0", "1\r", "٣"]
)
def test_bad_lines(tmp_path, line):
    lines = Lines(write(tmp_path / "train.src", f"5\n{line}\n6 7\n"))
    assert lines[0].tolist() == [5] and lines[2].tolist() == [6, 7]
    with pytest.raises(ValueError, match=r"train\.src, line 2: expected ids joined by one space"):
        lines[1]


def test_ids_beyond_32_bits(tmp_path):
    lines = Lines(write(tmp_path / "train.src", "2147483647\n2147483648\n1 99999999999\n"))
    assert lines[0].tolist() == [2**31 - 1]
    with pytest.raises(ValueError, match=r"train\.src, line 2: expected ids below 2\^31"):
        lines[1]
    with pytest.raises(ValueError, match=r"train\.src, line 3: "):
        lines[2]


@pytest.mark.parametrize("index", [-1, 2])
def test_lines_that_are_not_there(tmp_path, index):
    with pytest.raises(IndexError, match=f"from 0 to 1, got {index}"):
        Lines(write(tmp_path / "train.src", "5\n6\n"))[index]


@pytest.mark.parametrize("text, message", [("", "an empty file"), ("1 2\n3 4", "cut short")])
def test_files_without_their_end(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"train\.src: .*{message}"):
        Lines(write(tmp_path / "train.src", text))
    assert names(tmp_path) == ["train.src"]


@pytest.mark.parametrize(
    "starts, bad",
    [
        ([], None),
        ([0, 4], None),  # the last line is not one line
        ([4, 6], None),  # the first line is left out
        ([0, 3, 6], 0),
        ([0, 5, 6], 0),
        ([0, 4, 6, 99], None),
        ([0, 6], 0),
    ],
)
def test_indices_of_other_files(tmp_path, starts, bad):
    path = write(tmp_path / "train.src", "1 2\n3\n4 5\n")
    (tmp_path / "train.src.idx").write_bytes(np.array(starts, "<u8").tobytes())
    with pytest.raises(ValueError, match=r"train\.src\.idx: expected"):
        lines = Lines(path)
        assert bad is not None
        lines[bad]
    assert path.read_text() == "1 2\n3\n4 5\n"


def test_index_of_half_a_number(tmp_path):
    path = write(tmp_path / "train.src", "1\n")
    (tmp_path / "train.src.idx").write_bytes(b"\0" * 7)
    with pytest.raises(ValueError, match="eight bytes a line, got 7"):
        Lines(path)


def test_files_of_different_lengths(tmp_path):
    write(tmp_path / "a.src", "1\n2\n")
    write(tmp_path / "a.trg", "1\n")
    with pytest.raises(ValueError, match=r"a\.trg: expected 2 lines as in a\.src, got 1"):
        SampleFiles(tmp_path / "a")


@pytest.mark.parametrize("taken", ["a.src", "a.trg", "a.src.idx", "a.trg.idx"])
def test_nothing_is_replaced(tmp_path, taken):
    write(tmp_path / taken, "precious")
    with pytest.raises(ValueError, match=rf"stem: .*{taken} exists"):
        write_samples(tmp_path / "a", [Sample.of([1], [1])])
    assert names(tmp_path) == [taken] and (tmp_path / taken).read_text() == "precious"


def test_a_crash_leaves_nothing(tmp_path):
    def drawn():
        yield Sample.of([1], [1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / "a", drawn())
    for bad in ([], [Sample.of([1], [-1])], [Sample.of([], [1])]):
        with pytest.raises(ValueError, match="samples: "):
            write_samples(tmp_path / "a", bad)
    assert names(tmp_path) == []


def test_source_appears_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)) and None
    )
    write_samples(tmp_path / "a", [Sample.of([1], [1])])
    assert sorted(order[:2]) == ["a.src.idx", "a.trg.idx"] and order[2:] == ["a.trg", "a.src"]


# The authors' files


@pytest.mark.parametrize(
    "name, task",
    [
        ("mqmtar", MQMTAR()),
        ("sort", Sort()),
        ("reverse", Reverse()),
        ("copy", Copy()),
    ],
)
def test_the_authors_files(tmp_path, name, task):
    if not (folder := os.environ.get("KREG_DATA")):
        pytest.skip("the authors' files are in KREG_DATA")
    source = Path(folder) / "generated_asentmax" / name
    if not source.exists():
        pytest.skip(f"{source} is not there")
    stems = sorted(path.stem for path in source.glob("*.src"))
    assert len(stems) == 15
    for stem in stems:
        for end in (".src", ".trg"):
            shutil.copyfile(source / f"{stem}{end}", tmp_path / f"{stem}{end}")
        found = SampleFiles(tmp_path / stem)
        split, *_, length = stem.split("_") if stem != "train" else (stem, "48")
        assert len(found) == (2000 if split == "train" else 20)
        drawn = [found[index] for index in range(len(found))]
        here = task if split == "train" else task.at(int(length))
        for sample in drawn:
            check(here, sample)
        # Written by us they are the same bytes.
        write_samples(tmp_path / "again", drawn)
        for end in (".src", ".trg"):
            assert (tmp_path / f"again{end}").read_bytes() == (source / f"{stem}{end}").read_bytes()
            index = np.fromfile(tmp_path / f"again{end}.idx", "<u8")
            np.testing.assert_array_equal(index, np.fromfile(tmp_path / f"{stem}{end}.idx", "<u8"))
        for path in tmp_path.glob("again*"):
            path.unlink()


def check(task, sample: Sample) -> None:
    source, target = sample.source.tolist(), sample.target.tolist()
    assert max(source + target) < task.data_ids
    if not isinstance(task, MQMTAR):
        assert len(source) in task.lengths
        wanted = {Copy: source, Reverse: source[::-1], Sort: sorted(source)}[type(task)]
        assert target == wanted
        return
    assert len(source) in set(map(task.source_length, task.lengths))
    words = {}
    asked = task.num_q * (task.k_len + 1)
    body, queries = source[:-asked], source[-asked:]
    for place in (place for place, value in enumerate(body) if value == 1):
        words[tuple(body[place - 2 : place])] = body[place + 1 : place + 3]
    values = [[2, *words[tuple(queries[at + 1 : at + 3])]] for at in range(0, asked, 3)]
    assert target == list(itertools.chain(*values))

"""One file from the network, which goes on where it stopped the last time."""

import errno
import fcntl
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from experiments.text.sources import file_digest

_BLOCK = 2**18
# (bytes that are there, bytes there will be or None)
type Report = Callable[[int, int | None], None]


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    report: Report = lambda done, total: None,
    timeout: float = 60.0,
) -> Path:
    """Fetch `url` into `path`, unless it is there already.

    What has come lies in `path`.part. If the transfer breaks off, the next call asks for the rest,
    on the condition that the file has not changed on the server meanwhile (its ETag, or date, lies
    in `path`.part.version); where a server cannot do that, it starts from the beginning. `path`
    itself appears only when it is whole, and has the checksum, if one is given.

    Raises:
        ValueError: not an address of the web, or a file with another checksum. If it was fetched
            just now it is removed; if it was there before it stays.
        OSError: no connection, no space, a transfer that broke off, or another process at it.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: expected http or https, got {url!r}")
    path = Path(path)
    if path.exists():
        _require_digest(path, path, sha256, "Move it away to fetch it again.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    version = path.with_name(f"{path.name}.part.version")
    with open(part, "ab") as file:
        _claim(file, path)
        _complete(file, url, version, report, timeout)
        try:
            _require_digest(part, path, sha256, "It has been discarded.")
        except ValueError:
            part.unlink()
            raise
        part.replace(path)
    version.unlink(missing_ok=True)
    return path


def _claim(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process is fetching this", str(path)) from error


def _complete(file: IO[bytes], url: str, version: Path, report: Report, timeout: float) -> None:
    """Append what is missing, or all of it where that is not possible."""
    here = file.tell()
    known = version.read_text() if here and version.is_file() else ""
    try:
        response = _open(url, here, known, timeout)
        with response:
            if response.status != http.client.PARTIAL_CONTENT:
                file.truncate(here := 0)
                version.write_text(_version(response))
            length = response.headers.get("Content-Length")
            total = None if length is None else here + int(length)
            _require_room(version.parent, total, here)
            report(here, total)
            while block := response.read(_BLOCK):
                file.write(block)
                here += len(block)
                report(here, total)
    except urllib.error.HTTPError as error:
        raise OSError(errno.EIO, f"the server answered {error.code} {error.reason}", url) from error
    except (http.client.HTTPException, urllib.error.URLError) as error:
        raise OSError(errno.EIO, f"cannot be fetched: {error}", url) from error
    file.flush()
    os.fsync(file.fileno())
    if total is not None and here != total:
        raise OSError(
            errno.EIO, f"broke off after {here:,} of {total:,} bytes; the next call goes on", url
        )


def _open(url: str, here: int, known: str, timeout: float) -> Any:
    """Ask for what follows the bytes that are here, if they are of a known version."""
    headers = {"User-Agent": "kreg", "Accept-Encoding": "identity"}
    if known:
        conditions = {"Range": f"bytes={here}-", "If-Range": known}
        request = urllib.request.Request(url, headers=headers | conditions)
        try:
            response = urllib.request.urlopen(request, timeout=timeout)
        # Everything is here, and only the name was missing; or more than that: start again.
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        else:
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {here}-")
            if begins or response.status != http.client.PARTIAL_CONTENT:
                return response
            response.close()
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)


def _version(response: Any) -> str:
    """What names the contents strictly: an ETag that is not weak, else the date of change."""
    tag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _require_room(folder: Path, total: int | None, here: int) -> None:
    free = shutil.disk_usage(folder).free
    if total is not None and total - here > free:
        raise OSError(
            errno.ENOSPC, f"{total - here:,} bytes to come, {free:,} are free", str(folder)
        )


def _require_digest(file: Path, name: Path, sha256: str | None, advice: str) -> None:
    if sha256 is not None and (found := file_digest(file)) != sha256:
        raise ValueError(f"{name}: expected the SHA-256 {sha256}, got {found}. {advice}")

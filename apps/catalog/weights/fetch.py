"""Fetches files of one repository from the hub: a program of its own, run by a download job.

Reads one JSON request on stdin, so that the token is in no argument and no environment, and writes one JSON object
per line. Its own process because it can be ended at any moment (a blocked read cannot), keeps huggingface_hub out of
the worker's memory, and gets its settings (no Xet, no token found elsewhere, no telemetry) before that is imported.

``hf_hub_download`` is not used: since huggingface_hub 2 it writes to a file with a random name and deletes it
when it fails, so nothing could be carried on. ``http_get`` below it takes the size at which to go on.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SETTINGS = {
    "HF_HUB_DISABLE_XET": "1",  # one protocol, plain HTTP with ranges: it can be carried on and works through proxies
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # only the token of the panel
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}
PARALLEL = 4
TELL_SECONDS = 0.5
CHUNK_BYTES = 2**20
LOOK_AT_DISK_BYTES = 64 * 2**20
FRUITLESS_MAX = 3  # attempts in a row that brought nothing
WAIT_MAX_SECONDS = 60.0
PART = ".part"


class Refused(Exception):
    """``kind`` is a word that the job turns into a sentence; ``detail`` is what was read."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


class Stopped(Exception):
    """Another file failed; this one keeps what it has."""


_out = threading.Lock()


def tell(event: str, **values: Any) -> None:
    with _out:
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


class PartFile:
    """The growing file as ``http_get`` sees it: counts, hashes what it writes, and watches the disk.

    What an earlier attempt left is read once, so that the checksum covers every byte on the disk.
    """

    def __init__(self, name: str, path: Path, size_bytes: int, digest: Callable[[], Any], download: Download) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._path = path
        self._size = size_bytes
        self._new_digest = digest
        self._digest = digest()
        self._reserve = download.reserve
        self._stop = stop = download.stop
        self._all_done = download.done
        self._name = name
        self._next_look = 0
        while block := self._file.read(8 * CHUNK_BYTES):
            if stop.is_set():
                raise Stopped
            self._digest.update(block)
        self._count(self._file.tell())

    def _count(self, done: int) -> None:
        self.done = self._all_done[self._name] = done

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        if self.done + len(data) > self._size:
            raise Refused("too_long")
        if self.done >= self._next_look:
            self._next_look = self.done + LOOK_AT_DISK_BYTES
            free = free_bytes(self._path)
            if free < self._reserve:
                raise Refused("disk_full", str(free))
        self._file.write(data)
        self._digest.update(data)
        self._count(self.done + len(data))
        return len(data)

    # ``http_get`` starts a file again when a server ignores the range.
    def tell(self) -> int:
        return self.done

    def seek(self, position: int) -> None:
        if position != 0:
            raise OSError(f"cannot go to {position}")
        self._file.seek(0)
        self._digest = self._new_digest()
        self._count(0)
        self._next_look = 0

    def truncate(self) -> None:
        self._file.truncate()

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return str(self._digest.hexdigest())


def free_bytes(path: Path) -> int:
    stat = os.statvfs(path.parent)
    return stat.f_bavail * stat.f_frsize


class Download:
    """All files of one request, several at a time."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.repo = str(request["repo"])
        self.revision = str(request["revision"])
        self.token = request.get("token") or False
        self.folder = Path(request["folder"])
        self.reserve = int(request.get("reserve_bytes", 0))
        self.files: list[dict[str, Any]] = request["files"]
        self.stop = threading.Event()
        self.done: dict[str, int] = {}

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused("locked") from None
            pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch")
            work = [pool.submit(self._one, file) for file in self.files]
            self._follow(work)
            pool.shutdown(wait=True)
            errors = [e for f in work if (e := f.exception()) is not None]
            for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
                raise error

    def _follow(self, work: list[Future[None]]) -> None:
        told: dict[str, int] = {}
        waiting = set(work)
        while waiting:
            ended, waiting = wait(waiting, timeout=TELL_SECONDS, return_when=FIRST_EXCEPTION)
            if any(f.exception() is not None for f in ended):
                self.stop.set()
            now = dict(self.done)
            if news := {name: done for name, done in now.items() if told.get(name) != done}:
                tell("progress", files=news)
                told = now

    def _one(self, file: dict[str, Any]) -> None:
        name, size = str(file["name"]), int(file["size_bytes"])
        target = self.folder / name
        if target.is_file() and target.stat().st_size == size:
            self.done[name] = size  # renamed only after its checksum was right
            tell("file", name=name, state="there")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + PART)
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        for attempt in (1, 2):
            if self._fetch(file, part):
                part.replace(target)
                tell("file", name=name, state="done")
                return
            part.unlink()
            tell("file", name=name, state="checksum", attempt=attempt)
        raise Refused("checksum", name)

    def _fetch(self, file: dict[str, Any], part: Path) -> bool:
        """Until every byte is there; returns whether the checksum is right."""
        import httpx2

        name, size = str(file["name"]), int(file["size_bytes"])
        sha256 = str(file.get("sha256") or "")
        blob_id = str(file.get("blob_id") or "")

        def digest() -> Any:
            if sha256:
                return hashlib.sha256()
            return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)  # as git names an object

        out = PartFile(name, part, size, digest, self)
        try:
            if out.done:
                tell("file", name=name, state="resumed", at=out.done)
            fruitless = 0
            while out.done < size:
                before = out.done
                try:
                    self._get(name, out)
                except httpx2.TransportError as error:
                    fruitless = 0 if out.done > before else fruitless + 1
                    if fruitless >= FRUITLESS_MAX:
                        raise
                    tell("retry", name=name, at=out.done, why=type(error).__name__)
                    self._pause(min(WAIT_MAX_SECONDS, 2.0**fruitless))
            return out.hexdigest() == (sha256 or blob_id) or not (sha256 or blob_id)
        finally:
            out.close()

    def _get(self, name: str, out: PartFile) -> None:
        """One request. Who resumes asks anew where the file lies: signed addresses expire."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers

        url = hf_hub_url(self.repo, name, revision=self.revision)
        metadata = get_hf_file_metadata(url, token=self.token, retry_on_errors=True)
        headers = build_hf_headers(token=self.token)
        headers["Accept-Encoding"] = "identity"  # a range counts bytes of the file, not of a packed one
        if _host(metadata.location) != _host(url):
            headers.pop("authorization", None)  # a content network gets no token
        try:
            # Without expected_size: the library refuses files above 50 GB by it; the size is checked here anyway.
            http_get(metadata.location, out, resume_size=out.done, headers=headers)  # type: ignore[arg-type]
        except HfHubHTTPError as error:
            if error.response.status_code != 416:
                raise
            out.seek(0)  # what is here is not the beginning of what is there
            out.truncate()

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped


def _host(url: str) -> str:
    return urlsplit(url).netloc


def listing(request: dict[str, Any]) -> None:
    """The commit that a revision means now, and its files with sizes and checksums."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=request.get("token") or False)
    for attempt in range(4):
        try:
            info = api.model_info(
                str(request["repo"]), revision=request.get("revision") or None, files_metadata=True, timeout=30
            )
            break
        except HfHubHTTPError as error:
            if error.response.status_code != 429 or attempt == 3:
                raise
            wait_for = error.response.headers.get("Retry-After", "")
            seconds = min(WAIT_MAX_SECONDS, float(wait_for) if wait_for.isdecimal() else 2.0**attempt)
            tell("retry", name="", at=0, why=f"the hub asks to wait {seconds:.0f} s")
            time.sleep(seconds)
    tell("commit", sha=str(info.sha or ""), gated=bool(info.gated))
    for file in info.siblings or []:
        tell(
            "listed",
            name=file.rfilename,
            size_bytes=int(file.size or 0),
            sha256=str(file.lfs.sha256) if file.lfs else "",
            blob_id=str(file.blob_id or ""),
        )


def kind_of(error: BaseException) -> tuple[str, str]:
    """(a word, what was read) for whatever went wrong."""
    import errno

    import httpx2
    from huggingface_hub import errors

    if isinstance(error, Refused):
        return error.kind, error.detail
    if isinstance(error, errors.GatedRepoError):
        return "gated", ""
    if isinstance(error, errors.RevisionNotFoundError):
        return "no_revision", ""
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no_repository", str(error.response.status_code)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "no_file", ""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        word = {401: "bad_token", 403: "forbidden", 429: "rate_limited"}.get(status, "hub_error")
        return word, error.response.headers.get("Retry-After", "") if status == 429 else str(status)
    if isinstance(error, (httpx2.TransportError, errors.OfflineModeIsEnabled)):
        return "no_network", type(error).__name__
    if isinstance(error, errors.FileMetadataError):
        return "not_a_hub", ""
    if isinstance(error, errors.HFValidationError):
        return "bad_name", ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full", "0"
    if isinstance(error, OSError) and error.errno is not None:
        return "disk", error.strerror or ""
    return "unknown", f"{type(error).__name__}: {error}"


def main() -> int:
    # Whoever started this reads its progress; without it nobody would, and a second one may be started.
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    request = json.loads(sys.stdin.read())
    os.environ.update(SETTINGS)  # read when the library is imported
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
    try:
        if request["do"] == "list":
            listing(request)
        else:
            Download(request).run()
    except Exception as error:
        kind, detail = kind_of(error)
        tell("error", kind=kind, detail=detail[:500])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

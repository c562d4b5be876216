"""Paths in object stores, `gs://` and `az://`, by blobfile: a remote folder is a local one that is mirrored.

The program works on local files, whole and fast. A remote folder is fetched into a cache when a command starts, and
what has changed there is uploaded when a checkpoint is whole, the opt file last. An object appears when its upload is
complete, so that a bucket never shows half a file, nor an opt file whose weights are not there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from text_diffusion.errors import UserError
from text_diffusion.lock import NAME as LOCK
from text_diffusion.lock import FolderLock

T = TypeVar("T")
SCHEMES = ("gs://", "az://")
PENDING = ".pending.json"  # what could not be uploaded; it is tried again at the next start
RETRIES = 5  # of a request, with pauses that double
TIMEOUT = 30  # seconds for an answer
get_http_pool: Callable[[], Any] | None = None  # blobfile's hook, for proxies and the like: how connections are made


class StoreError(UserError):
    """A bucket does not answer, or refuses."""


def is_remote(path: str) -> bool:
    """Whether a path names an object store. (Path("gs://a/b") would make gs:/a/b of it.)

    Raises:
        UserError: it names a store of a kind that is not supported.
    """
    if re.match(r"\w[\w+.-]*://", path) and not path.startswith(SCHEMES):
        raise UserError(f"{path}: expected a path on this machine, or one that begins with {' or '.join(SCHEMES)}")
    return path.startswith(SCHEMES)


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def cache_of(url: str, pattern: str = "*") -> Path:
    """Where a remote folder (or those of its files that a pattern names) or file is kept; one place for each."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-diffusion"
    return root / hashlib.sha256(f"{url.rstrip('/')} {pattern}".encode()).hexdigest()[:16] / name_of(url)


def local(path: str) -> Path:
    """A path on this machine: a remote file is fetched, a local one stays where it is.

    Raises:
        UserError: it is not there, or may not be read.
    """
    if not is_remote(path):
        return Path(path)
    store, target = _store(), cache_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _asked(path, lambda: store.exists(path)):
        raise UserError(f"{path}: expected a file, found none; check the name")
    _fetch(store, path, target)
    return target


class Mirror:
    """A remote folder and the local one that stands for it.

    Args:
        url: of the folder.
        pattern: which files are fetched.

    Raises:
        UserError: the store does not answer or refuses.
    """

    def __init__(self, url: str, pattern: str = "*") -> None:
        self.url, self.folder = url.rstrip("/"), cache_of(url, pattern)
        self.store = _store()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.folder)
        try:
            self._fetch_all(pattern)
        except BaseException:
            self.lock.release()
            raise

    def _fetch_all(self, pattern: str) -> None:
        names = _asked(self.url, lambda: self._names())
        pending = self._pending()
        if _last_step(names) >= _last_step(pending):  # another machine has gone on
            pending = []
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in (*pending, PENDING, LOCK):
                path.unlink()
        self.uploaded: dict[str, tuple[int, int]] = {}
        for name in names:
            if name not in pending and fnmatch.fnmatch(name, pattern):
                _fetch(self.store, f"{self.url}/{name}", self.folder / name)
                self.uploaded[name] = _stamp(self.folder / name)
        if pending:
            print(f"{self.url}: uploading what could not be uploaded before: {', '.join(pending)}", file=sys.stderr)
            self.push()

    def push(self) -> None:
        """Upload what is new here, and remove there what is no longer here; opt files are the last to come.

        Raises:
            StoreError: the store does not answer or refuses; what is missing there stays here for the next start.
        """
        here = {path.name: _stamp(path) for path in self.folder.iterdir() if path.is_file() and path.name[0] != "."}
        new = sorted((name for name in here if self.uploaded.get(name) != here[name]), key=_opt_last)
        gone = sorted(self.uploaded.keys() - here.keys(), key=_opt_last, reverse=True)  # opt files are the first to go
        try:
            for name in new:
                self._upload(name)
                self.uploaded[name] = here[name]
            for name in gone:
                self._remove(name)
                del self.uploaded[name]
        finally:
            missing = [name for name in new if self.uploaded.get(name) != here[name]]
            path = self.folder / PENDING
            if missing:
                path.write_text(json.dumps(missing))
            else:
                path.unlink(missing_ok=True)

    def _pending(self) -> list[str]:
        path = self.folder / PENDING
        names: list[str] = json.loads(path.read_text()) if path.is_file() else []
        return [name for name in names if (self.folder / name).is_file()]

    def _names(self) -> list[str]:
        if not self.store.isdir(self.url):
            return []
        return [entry.name for entry in self.store.scandir(self.url) if not entry.is_dir]

    def _upload(self, name: str) -> None:
        url = f"{self.url}/{name}"
        _asked(url, lambda: self.store.copy(str(self.folder / name), url, overwrite=True))

    def _remove(self, name: str) -> None:
        url = f"{self.url}/{name}"

        def remove() -> None:
            if self.store.exists(url):
                try:
                    self.store.remove(url)
                except Exception:  # of a request that was tried again, the first may have done it
                    if self.store.exists(url):
                        raise

        _asked(url, remove)


def _store() -> Any:
    """blobfile, giving up after a while (of its own accord it would try for ever) and silent on standard output."""
    try:
        import blobfile
    except ImportError:
        raise UserError(f"paths with {' or '.join(SCHEMES)} need a library: pip install blobfile") from None
    return blobfile.create_context(
        retry_limit=RETRIES,
        connect_timeout=TIMEOUT,
        read_timeout=TIMEOUT,
        get_http_pool=get_http_pool,
        log_callback=lambda message: print(message[:200], file=sys.stderr),
        retry_log_threshold=RETRIES,
        retry_common_log_threshold=RETRIES,
        save_access_token_to_disk=False,
    )


def _fetch(store: Any, url: str, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _asked(url, lambda: store.copy(url, str(temporary), overwrite=True))
        shutil.move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _asked(url: str, ask: Callable[[], T]) -> T:
    """What the store answers.

    Raises:
        StoreError: it does not answer, or refuses.
    """
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # blobfile has errors of its own, of urllib3 and of Python's for one and the same cause
        text = str(error) or type(error).__name__
        status = getattr(error, "response_status", None)
        credentials = status in (401, 403) or "credential" in text.lower() or "anonymous" in text.lower()
        found = text.splitlines()[0][:200]
        what = (
            "credentials that may use it (Google: GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default "
            "login`; Azure: AZURE_STORAGE_KEY or `az login`)"
            if credentials
            else "the store to answer; try again later, or take another path"
        )
        raise StoreError(f"{url}: expected {what}, found: {found}") from None


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _last_step(names: list[str]) -> int:
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"opt(\d+)\.pt", name))), default=-1)


def _opt_last(name: str) -> tuple[bool, str]:
    return name.startswith("opt"), name

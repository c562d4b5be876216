"""Files in object stores, `gs://` and `az://`, by blobfile: the program works on local copies, whole and fast.

A remote file is fetched into a cache, unless the same version of it is there already; folders are in `mirror`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, write_atomically

T = TypeVar("T")
SCHEMES = ("gs://", "az://")
RECORD = ".versions.json"  # in a folder of the cache
RETRIES = 5  # of a request, with pauses that double
TIMEOUT = 30  # seconds for an answer
get_http_pool: Callable[[], Any] | None = None  # blobfile's hook, for proxies and the like: how connections are made


NAMES = {  # as the makers state them: of a bucket; of an account and a container
    "gs://": (re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?"), "gs://BUCKET/PATH"),
    "az://": (
        re.compile(r"az://[a-z0-9]{3,24}/(\$web|\$root|[a-z0-9](-?[a-z0-9]){2,62})(/.*)?"),
        "az://ACCOUNT/CONTAINER/PATH",
    ),
}


class StoreError(UserError):
    """A bucket does not answer, or refuses."""


def is_remote(path: str) -> bool:
    """Whether a path names an object store. (Path("gs://a/b") would make gs:/a/b of it.)

    Raises:
        UserError: it names a store of a kind that is not supported, or cannot be a name there.
    """
    if re.match(r"\w[\w+.-]*://|(gs|az):", path) and not path.startswith(SCHEMES):
        raise UserError(f"{path}: expected a path on this machine, or one that begins with {' or '.join(SCHEMES)}")
    if not path.startswith(SCHEMES):
        return False
    pattern, form = NAMES[path[:5]]
    if not pattern.fullmatch(path):
        raise UserError(f"{path}: expected {form}, found a name that no store can have; mend the path")
    return True


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
    store, target = open_store(), cache_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not asked(path, lambda: store.exists(path)) or path.endswith("/"):
        raise UserError(f"{path}: expected a file, found none; check the name")
    versions = Versions(target.parent)
    version = version_of(asked(path, lambda: store.stat(path)))
    if not versions.has(target.name, version):
        fetch(store, path, target)
        versions.note(target.name, version)
    return target


def output(path: str, *read: str) -> Path:
    """A file on this machine that is to be written, by a command that reads others.

    Raises:
        UserError: it is in a store, is a folder or one of those that are read, or cannot be written.
    """
    if is_remote(path):
        raise UserError(f"{path}: expected a file on this machine to write to, found one in a store")
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{path}: expected a file to write to, found a folder")
    if target.exists() and any(Path(name).exists() and target.samefile(name) for name in read):
        raise UserError(f"{path}: expected a file of its own to write to, found one that is read")
    check_writable(target.parent)
    return target


class Versions:
    """Which version of each remote file its local copy is, remembered in a folder of the cache from run to run.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RECORD
        self.known: dict[str, list[Any]] = {}  # by name: version, time of change and size of the local file
        with contextlib.suppress(OSError, ValueError):  # without it all is fetched anew
            self.known = json.loads(self.path.read_bytes())

    def has(self, name: str, version: str) -> bool:
        """Whether the local file is that version of the remote one, and unchanged since."""
        return self.is_current(name) and self.known[name][0] == version

    def is_current(self, name: str) -> bool:
        """Whether the local file is as it was when it was last fetched or uploaded."""
        path = self.folder / name
        return name in self.known and path.is_file() and self.known[name][1:] == list(stamp(path))

    def note(self, name: str, version: str, when: tuple[int, int] | None = None) -> None:
        """The local file (as it was at a stamp, if one is given) is that version."""
        self.known[name] = [version, *(when or stamp(self.folder / name))]
        self._write()

    def forget(self, name: str) -> None:
        """The file is no longer in the store."""
        self.known.pop(name, None)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.known).encode()
        write_atomically(self.path, lambda file: file.write(text))


def version_of(stat: Any) -> str:
    """What distinguishes one content of a remote file from the next."""
    return f"{str(stat.version).strip(chr(34))} {stat.size}"  # some answers have the etag in quotes, some have not


def stamp(path: Path) -> tuple[int, int]:
    """What distinguishes one content of a local file from the next."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def open_store() -> Any:
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


def fetch(store: Any, url: str, target: Path) -> None:
    """Copy a remote file to this machine, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        asked(url, lambda: store.copy(url, str(temporary), overwrite=True))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def asked(url: str, ask: Callable[[], T]) -> T:
    """What the store answers.

    Raises:
        StoreError: it does not answer, or refuses.
    """
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # blobfile has errors of its own, of urllib3 and of Python's for one and the same cause
        raise StoreError(f"{url}: expected {_wanted(error)}, found: {_said(error)}") from None


def _wanted(error: Exception) -> str:
    text, status = str(error).lower(), getattr(error, "response_status", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "the bucket (or account and container) to be there; make it, or mend its name"
    if status in (401, 403) or "credential" in text or "anonymous" in text:
        return (
            "credentials that may use it (Google: GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default "
            "login`; Azure: AZURE_STORAGE_KEY or `az login`)"
        )
    return "the store to answer; try again later, or take another path"


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

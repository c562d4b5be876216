"""A folder in an object store and the local one that stands for it.

It is fetched into a cache when a command starts (only what is not there already), and what has changed there is
uploaded when a checkpoint is whole, the opt file last. An object appears when its upload is complete, so that a bucket
never shows half a file, nor an opt file whose weights are not there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from text_diffusion import remote
from text_diffusion.lock import FolderLock
from text_diffusion.remote import Versions, asked, cache_of, fetch, open_store, stamp, version_of

STAGE = ".upload"  # in the local folder: links to what is being uploaded, which nobody removes meanwhile
CHUNK = 2**20


class Mirror:
    """A remote folder and the local one that stands for it.

    Args:
        url: of the folder.
        pattern: which files are fetched.

    Raises:
        UserError: the store does not answer or refuses, or the folder cannot be written to.
    """

    def __init__(self, url: str, pattern: str = "*") -> None:
        self.url, self.pattern, self.folder = url.rstrip("/"), pattern, cache_of(url, pattern)
        self.store = open_store()
        self.alive = time.monotonic()  # when the store last took something
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.folder)
        self.versions = Versions(self.folder)
        try:
            self._probe()
            self._fetch_all()
        except BaseException:
            self.lock.release()
            raise

    def push(self) -> None:
        """Upload what is new here, and remove there what is no longer here; opt files are the last to come.

        Raises:
            StoreError: the store does not answer or refuses; what is missing there stays here for the next start.
        """
        here, staged = self._staged()
        try:
            for name in sorted(staged, key=_opt_last):
                self._upload(staged[name], f"{self.url}/{name}")
                self.versions.note(name, self._version(f"{self.url}/{name}"), here[name])
            for name in sorted(self.versions.known.keys() - here.keys(), key=_opt_last, reverse=True):
                self._remove(f"{self.url}/{name}")
                self.versions.forget(name)
        finally:
            shutil.rmtree(self.folder / STAGE, ignore_errors=True)

    def _probe(self) -> None:
        """Find out now, not at the first checkpoint, whether files can be written there."""
        probe, empty = f"{self.url}/.writable-{uuid.uuid4().hex}", self.folder / f".writable.{os.getpid()}"
        try:
            empty.touch()
            self._upload(empty, probe)
            self._remove(probe)
        finally:
            empty.unlink(missing_ok=True)

    def _fetch_all(self) -> None:
        shutil.rmtree(self.folder / STAGE, ignore_errors=True)
        there = asked(self.url, self._listed)
        kept = self._kept(there)
        for name in self._names() - kept:
            if name not in there:
                (self.folder / name).unlink()
        for name in sorted(self.versions.known.keys() - there.keys()):
            self.versions.forget(name)
        for name in sorted(there.keys() - kept, key=_opt_last):
            if not self.versions.has(name, there[name]):
                fetch(self.store, f"{self.url}/{name}", self.folder / name)
                self.versions.note(name, there[name])
        if kept:
            print(
                f"{self.url}: uploading what could not be uploaded before: {', '.join(sorted(kept))}", file=sys.stderr
            )
            self.push()

    def _kept(self, there: dict[str, str]) -> set[str]:
        """The files here that the store lacks, if this machine is the last that the run was on."""
        names = self._names()
        ours, theirs = _last_step(names), _last_step(there)
        emptied = self.versions.known and not self.versions.known.keys() & there.keys()
        if emptied or ours < theirs or (ours < 0 and self.pattern == "*"):  # the last: nothing to go on from
            return set()
        opt = next((name for name in there if _step(name) == theirs), None)
        if ours == theirs and opt and not self.versions.has(opt, there[opt]):  # another machine has made the same step
            return set()
        return {name for name in names if not self.versions.is_current(name)}

    def _staged(self) -> tuple[dict[str, tuple[int, int]], dict[str, Path]]:
        """The stamps of all files here, and links to those that are new, all of one moment."""
        stage = self.folder / STAGE
        while True:
            shutil.rmtree(stage, ignore_errors=True)
            staged = {}
            with contextlib.suppress(FileNotFoundError):  # one was removed since they were listed
                here = {name: stamp(self.folder / name) for name in self._names()}
                for name in here:
                    if not self.versions.is_current(name):
                        staged[name] = stage / name
                        staged[name].parent.mkdir(parents=True, exist_ok=True)
                        _link(self.folder / name, staged[name])
                return here, staged

    def _names(self) -> set[str]:
        """The files here, and those in their folders of shards."""
        found = [path for path in self.folder.iterdir() if path.name[0] != "."]
        inner = [path for folder in found if folder.suffix == ".shards" for path in folder.iterdir()]
        return {str(path.relative_to(self.folder)) for path in (*found, *inner) if path.is_file()}

    def _listed(self) -> dict[str, str]:
        """The files there, and those in their folders of shards, with their versions."""
        found: dict[str, str] = {}
        folders = [self.url]
        for folder in folders:
            if not self.store.isdir(folder):
                continue
            for entry in self.store.scandir(folder):
                if not entry.is_dir:
                    found[f"{folder}/{entry.name}".removeprefix(f"{self.url}/")] = version_of(entry.stat)
                elif folder == self.url and entry.name.endswith(".shards"):
                    folders.append(f"{folder}/{entry.name}")
        return {name: version for name, version in found.items() if fnmatch.fnmatch(name, self.pattern)}

    def _version(self, url: str) -> str:
        return asked(url, lambda: version_of(self.store.stat(url)))

    def _upload(self, path: Path, url: str) -> None:
        from blobfile import RestartableStreamingWriteFailure  # an upload that Google wants from its beginning

        def upload() -> None:
            for attempt in range(remote.RETRIES + 1):
                try:
                    self._upload_once(path, url)
                    break
                except RestartableStreamingWriteFailure:
                    if attempt == remote.RETRIES:
                        raise
                    time.sleep(2**attempt)

        asked(url, upload)

    def _upload_once(self, path: Path, url: str) -> None:
        """In parts, each of which shows that the store is alive; the object appears after the last."""
        with (
            path.open("rb") as source,
            self.store.BlobFile(url, "wb", streaming=True, partial_writes_on_exc=False) as target,
        ):
            while chunk := source.read(CHUNK):
                target.write(chunk)
                self.alive = time.monotonic()
        self.alive = time.monotonic()

    def _remove(self, url: str) -> None:
        def remove() -> None:
            if self.store.exists(url):
                try:
                    self.store.remove(url)
                except Exception:  # of a request that was tried again, the first may have done it
                    if self.store.exists(url):
                        raise

        asked(url, remove)
        self.alive = time.monotonic()


def _link(path: Path, target: Path) -> None:
    """Keep a file, which is replaced or removed but never changed (the log alone grows), under a second name."""
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(path, target)


def _step(name: str) -> int:
    found = re.fullmatch(r"opt(\d+)\.pt", name)
    return int(found[1]) if found else -1


def _last_step(names: Iterable[str]) -> int:
    return max(map(_step, names), default=-1)


def _opt_last(name: str) -> tuple[int, bool, str]:
    """Of one step after the other the opt file last, as it says that the rest is there."""
    found = re.match(r"(?:model|opt|ema_[\d.]+_)(\d+)\.", name)
    return int(found[1]) if found else -1, _step(name) >= 0, name

"""Checkpoints are written while training goes on: it waits for the copy in memory only, not for the disk."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from text_diffusion.distributed import Ranks
from text_diffusion.errors import UserError
from text_diffusion.mirror import Mirror
from text_diffusion.snapshot import Snapshot, prune, remove_shards, shards_path, write_shards
from text_diffusion.uploads import Uploads


class Saver:
    """Writes one checkpoint after the other; every rank has one, as each writes its shards.

    Args:
        folder: the run's.
        ranks: rank 0 writes what is not sharded.
        keep_last: how many checkpoints stay; 0: all.
        background: whether `save` returns before all is written.
        mirror: what was written is uploaded, by another thread; if it cannot be, training goes on.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep_last: int, background: bool, mirror: Mirror | None = None
    ) -> None:
        self.folder, self.ranks, self.keep_last, self.background = folder, ranks, keep_last, background
        self.uploads = Uploads(mirror) if mirror else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.writing: Future[list[Path]] | None = None
        self.written: set[int] = set()  # steps, by this process
        # Of its own, as what ranks exchange on two threads must not get mixed up.
        self.group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    def save(self, snapshot: Snapshot) -> None:
        """Write it, after the one before: of two copies in memory there is no need.

        Raises:
            UserError: it, or the one before, cannot be written.
        """
        self.finish()
        self.writing = self.thread.submit(self._write, snapshot)
        if not self.background:
            self.finish()

    def check(self) -> None:
        """Raise what went wrong by now; waits for nothing."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    def finish(self) -> list[Path]:
        """Wait for the checkpoint under way; its weights files, the raw one first (on rank 0).

        Raises:
            UserError: it cannot be written.
        """
        return self.writing.result() if self.writing is not None else []

    def finish_uploads(self) -> None:
        """Wait until all is in the bucket, the rows of the log included that came after the last checkpoint.

        Raises:
            UserError: it cannot be uploaded.
        """
        if self.uploads:
            self.uploads.want(max(self.written, default=0))
            self.uploads.finish()

    def close(self) -> None:
        """Wait for the checkpoint under way and its upload, whatever becomes of them."""
        self.thread.shutdown()
        if self.uploads:
            with contextlib.suppress(UserError):  # said already
                self.uploads.finish()

    def _write(self, snapshot: Snapshot) -> list[Path]:
        if snapshot.shards:
            if self.ranks.first:
                remove_shards(self.folder, snapshot.step)  # of a run that was killed while it wrote them
            dist.barrier(self.group)
            write_shards(shards_path(self.folder, snapshot.step), snapshot.shards, self.group)
        if not self.ranks.first:
            return []
        paths = snapshot.write(self.folder)
        self.written.add(snapshot.step)
        prune(self.folder, snapshot.run, self.keep_last, self.written)
        if self.uploads:
            self.uploads.want(snapshot.step)
        return paths

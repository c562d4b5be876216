"""Uploads in a thread of their own: neither training nor the next checkpoint waits for a bucket."""

from __future__ import annotations

import sys
import threading
import time

from text_diffusion import remote
from text_diffusion.errors import UserError
from text_diffusion.mirror import Mirror
from text_diffusion.remote import StoreError


class Uploads:
    """Uploads what is new in a mirror; of checkpoints that come while another is under way, the newest.

    Args:
        mirror: whose local folder the checkpoints are written to.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.changed = threading.Condition()  # guards what follows
        self.waiting: int | None = None  # the step of a checkpoint that is to be uploaded
        self.busy: int | None = None  # that of the upload under way
        self.said = False  # that later ones wait for it
        self.problem: UserError | None = None  # of the last upload
        # As a daemon it holds up the end of the program by no more than `finish` allows.
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def want(self, step: int) -> None:
        """Have the checkpoint of a step, which is whole in the local folder, uploaded; waits for nothing."""
        with self.changed:
            self.waiting = step
            if self.busy not in (None, step) and not self.said:  # at the end of a run the last step is wanted again
                self.said = True
                say(
                    f"step {step} is not in {self.mirror.url} yet, only in {self.mirror.folder}: the upload of step "
                    f"{self.busy} is still under way; training goes on, and the newest checkpoint follows"
                )
            self.changed.notify_all()

    def finish(self) -> None:
        """Wait for what is under way, as long as the store takes something.

        Raises:
            StoreError: not everything could be uploaded.
        """
        with self.changed:
            begun = time.monotonic()
            while self.busy is not None or self.waiting is not None:
                self.changed.wait(0.5)
                silent = time.monotonic() - max(begun, self.mirror.alive)
                if silent > patience():
                    raise StoreError(
                        f"{self.mirror.url}: expected the store to take the checkpoint, found it silent for "
                        f"{silent:.0f} seconds; all is whole in {self.mirror.folder}, "
                        "and the same command goes on from there"
                    )
            if self.problem:
                raise self.problem

    def _work(self) -> None:
        while True:
            with self.changed:
                while self.waiting is None:
                    self.changed.wait()
                self.busy, self.waiting = self.waiting, None
            problem: UserError | None = None
            try:
                self.mirror.push()
            except UserError as error:
                problem = error
            except Exception as error:  # of a thread that dies nobody would hear
                problem = StoreError(f"{self.mirror.url}: expected an upload, found {type(error).__name__}: {error}")
            with self.changed:
                self._report(self.busy, problem)
                self.busy, self.said, self.problem = None, False, problem
                self.changed.notify_all()

    def _report(self, step: int, problem: UserError | None) -> None:
        if problem:
            say(
                f"warning: step {step} is not saved in {self.mirror.url}, only here in {self.mirror.folder}; "
                f"training goes on, and the next checkpoint tries again: {problem}"
            )
        elif self.problem or self.said:
            say(f"step {step} is saved in {self.mirror.url} again")


def patience() -> float:
    """Seconds of silence after which the end of a run waits no longer: more than all tries of a request take."""
    return 2.0 * (remote.RETRIES + 1) * remote.TIMEOUT


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""The processes that share one run: they find each other, share a batch, agree, and end together.

Everything here is one process's view of all of them. With one process there is no process group, and every method of
`Ranks` gives back what it was given. Between ranks go torch's collectives: gloo on CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from text_diffusion import errors
from text_diffusion.errors import Interrupted, Refused, UserError
from text_diffusion.launcher import Place, abort, find_place
from text_diffusion.route import use_route_to

T = TypeVar("T")
RENDEZVOUS = datetime.timedelta(minutes=2)  # until all ranks are there
PATIENCE = datetime.timedelta(minutes=30)  # with a rank that says nothing, as it may be reading or writing a large file
LOST = ("connection closed", "connection reset", "broken pipe", "connection refused", "timed out", "timeout", "eof")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the run.

    Args:
        rank: 0..size-1; rank 0 alone reads and writes the files of the run.
        size: how many.
        local_rank: 0, 1, ... among those on this host: which GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's part of 0..n-1: parts follow each other, and begin at even places.

        (Self-conditioning takes every second sentence of what a rank has.) They are equal if n is a multiple of
        2 * size, or if there is one rank.
        """
        pairs = -(-n // 2)
        start, stop = (2 * (pairs * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, min(stop, n))

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)  # over gloo, between GPUs too
        return values

    def join(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of each tensor (b,), the ranks' equal shares put together, (size * b,), on every rank; in one exchange."""
        if self.size == 1:
            return tensors
        names = list(tensors)
        mine = torch.stack([tensors[name].double() for name in names])  # exact for integers, such as t, too
        shares = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shares, mine)
        whole = torch.cat(shares, dim=1)  # (names, size * b)
        return {name: whole[i].to(tensors[name].dtype) for i, name in enumerate(names)}

    def total(self, numbers: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks, by name; a rank may lack some."""
        totals: dict[str, float] = {}
        for part in self.gather(numbers):
            totals |= {name: totals.get(name, 0.0) + value for name, value in part.items()}
        return totals

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank; asked between CPUs, so that no GPU is waited for."""
        if self.size == 1:
            return flag
        asked = torch.tensor(int(flag))
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def together(self, work: Callable[[], T]) -> T:
        """work() on every rank; if one is refused, all are, with the sentence of the first of them.

        Raises:
            UserError: on rank 0, which says it; on the others `Refused`.
        """
        if self.size == 1:
            return work()
        result: T
        problem = None
        try:
            result = work()
        except Refused:  # by all of them, in a `together` within this one
            raise
        except UserError as error:
            problem = str(error)
        problems = [(rank, text) for rank, text in enumerate(self.gather(problem)) if text is not None]
        if problems:
            rank, text = problems[0]
            raise Refused(text if rank == 0 else f"rank {rank}: {text}", said=not self.first)
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """work() on rank 0; its result, or its UserError, on every rank."""
        return self.broadcast(self.together(lambda: work() if self.first else None))  # type: ignore[return-value]

    def agree(self, what: str, named: dict[str, object]) -> None:
        """Find out whether the values are the same on all ranks.

        Raises:
            UserError: naming the first that is not.
        """

        if self.size == 1:
            return

        def check() -> None:
            expected = self.broadcast(named)
            for name in sorted(expected | named):
                if repr(named.get(name)) != repr(expected.get(name)):  # as nan is not nan
                    raise UserError(
                        f"expected the same {what} on all ranks, found {name} {named.get(name)!r} beside "
                        f"{expected.get(name)!r} on rank 0; start every rank with the same command"
                    )

        self.together(check)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks, if a launcher started several; ranks other than 0 say nothing but errors.

    A rank that raises ends all of them: the launcher is told, and to the others the connection is lost.

    Raises:
        UserError: the launcher and what is found contradict each other, or the others do not come.
    """
    place = find_place()
    if place.size == 1:
        yield ALONE
        return
    ranks = Ranks(place.rank, place.size, place.local_rank)
    try:
        _meet(place)
        if ranks.gather(place.rank) != list(range(place.size)):
            raise UserError(f"expected {place.size} ranks, each once, found others; start all with one launcher")
        with _quiet(not ranks.first):
            yield ranks
    except (Interrupted, Refused) as error:  # all ranks end here, and one says why
        dist.destroy_process_group()
        if isinstance(error, Interrupted) and not ranks.first:
            raise Interrupted("", error.number) from None
        raise
    except BaseException as error:
        _end_all(_explained(error, place))
        raise
    dist.destroy_process_group()


def _meet(place: Place) -> None:
    """The process group."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
    use_route_to(place.address, one_host=place.local_size == place.size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store = _store(place)
        store.set_timeout(RENDEZVOUS)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise UserError(
                f"expected port {place.port} on {place.address} to be free, found it in use; set MASTER_PORT to "
                "another one (the same for all ranks), or wait for the run that has it"
            ) from None
        raise UserError(
            f"expected {place.size} ranks to meet at {place.address} port {place.port} within "
            f"{RENDEZVOUS.seconds} seconds, found them missing or another program there: {str(error).splitlines()[0]}"
        ) from None


def _store(place: Place) -> Store:
    """Where the ranks leave word for each other: rank 0 listens, or torchrun does."""
    if place.launcher == "torchrun":
        found: Store = next(rendezvous("env://", place.rank, place.size, timeout=RENDEZVOUS))[0]
        # Its store outlives its workers: those that it starts again must not read the addresses of the dead.
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), found)
    port, listens = place.port, place.rank == 0
    if place.mpi and not listens:
        port = place.mpi.bcast(None)
    store = TCPStore(place.address, port, place.size, listens, RENDEZVOUS, wait_for_workers=False)
    if place.mpi and listens:
        place.mpi.bcast(store.port)
    return store


def _explained(error: BaseException, place: Place) -> BaseException:
    """A lost connection as a sentence; every other error as it is."""
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST):
        return UserError(
            f"rank {place.rank} lost the connection to another rank, which has ended (its own message says why) or "
            "cannot be reached; the same command goes on from the last checkpoint"
        )
    if isinstance(error, UserError) and place.rank:
        return UserError(f"rank {place.rank}: {error}")
    return error


def _end_all(error: BaseException) -> None:
    """Say why, then end the process in the way that its launcher ends the others; does not return."""
    status = errors.say(error)
    abort(status)
    os._exit(status)  # not through destructors, which would wait for the others too


@contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """Let progress and results be said by rank 0 alone."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield

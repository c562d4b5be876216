"""Who started this process, and as which of how many: the environment says so, differently for each launcher.

    torchrun, or by hand    RANK and WORLD_SIZE are set
    mpiexec                 PMI_SIZE (MPICH) or OMPI_COMM_WORLD_SIZE (Open MPI) is more than 1: mpi4py tells the rest
    srun                    SLURM_NTASKS is more than 1
    none                    one process

The first that holds counts. mpi4py is imported under an MPI launcher only, as it needs an MPI library; under torchrun
it would tell every process that it is rank 0 of 1.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from text_diffusion.errors import UserError

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
WORLD_SIZE_VARIABLES = ("NPROC", "WORLD_SIZE", *MPI_SIZES, "SLURM_NTASKS")
SLURM_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Place:
    """One process among those of a launcher.

    Args:
        launcher: its name, for messages.
        rank: 0..size-1.
        size: processes in all.
        local_rank: 0, 1, ... among those on this host.
        local_size: how many are on this host.
        address: host where rank 0 listens.
        port: on which it listens; 0: it finds a free one, which MPI tells the others.
        mpi: the communicator of all of them, under an MPI launcher.
    """

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    mpi: Any = field(default=None, repr=False)


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands.

    Raises:
        UserError: the environment contradicts itself, or lacks a variable that the launcher should have set.
    """
    place = _find(env)
    asked = _number(env, "NPROC") if env.get("NPROC") else place.size  # empty is as good as none, as in the scripts
    if asked != place.size:
        raise UserError(
            f"expected {asked} processes (NPROC={asked}), found {place.size}; the scripts start as many as NPROC says, "
            f"and so does `mpiexec -n {asked}`; otherwise unset NPROC"
        )
    if not 0 <= place.rank < place.size:
        raise UserError(f"expected a rank below {place.size}, found {place.rank} (launcher: {place.launcher})")
    return place


def mpi_world(env: Mapping[str, str] = os.environ) -> Any:
    """The communicator of all ranks that mpiexec has started; None if it has not.

    The first call starts MPI.

    Raises:
        UserError: mpi4py cannot be used.
    """
    variable = _mpi_variable(env)
    if variable is None:
        return None
    size = env[variable]
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{variable}={size} says that mpiexec started this, and mpi4py cannot be used ({error}): "
            "pip install mpi4py mpich, or load the MPI module that mpiexec comes from"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != int(size):
        raise UserError(
            f"expected {size} ranks ({variable}), found {world.Get_size()}: mpi4py uses another MPI than this mpiexec; "
            "take the mpiexec that belongs to it (that of `pip install mpich` is beside python)"
        )
    return world


def abort(status: int) -> None:
    """End all ranks, if mpiexec has started them; otherwise return."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:  # at a plain exit it would wait for the others
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status)
    with contextlib.suppress(UserError):  # said already
        if _mpi_variable(os.environ):  # at a plain exit MPICH would not mind, and the others wait; a signal it sees
            signal.raise_signal(signal.SIGTERM)


def _mpi_variable(env: Mapping[str, str]) -> str | None:
    """The variable by which mpiexec says that it started several, where no torchrun has spoken first."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return None
    return next((name for name in MPI_SIZES if _number(env, name, 1) > 1), None)


def check_alone(command: str) -> None:
    """Refuse several processes, each of which would do all of the work of a command that is not shared between them.

    Raises:
        UserError: a launcher has started several.
    """
    place = find_place()
    if place.size > 1:
        raise UserError(f"{command} expects one process, found {place.size} ({place.launcher}); start it by itself")


def _find(env: Mapping[str, str]) -> Place:
    if "RANK" in env and "WORLD_SIZE" in env:
        size = _number(env, "WORLD_SIZE")
        if size == 1:
            for name in MPI_SIZES:
                if _number(env, name, 1) > 1:
                    raise UserError(f"expected WORLD_SIZE={env[name]} as in {name}, found 1; unset RANK and WORLD_SIZE")
            return Place()
        rank = _number(env, "RANK")
        local_rank = _number(env, "LOCAL_RANK", rank)
        local_size = _number(env, "LOCAL_WORLD_SIZE", size if "LOCAL_RANK" not in env else local_rank + 1)
        return Place("torchrun", rank, size, local_rank, local_size, *_rendezvous(env))
    if _number(env, "WORLD_SIZE", 1) != 1:
        raise UserError(f"expected RANK beside WORLD_SIZE={env['WORLD_SIZE']}, found none; torchrun sets both")
    if (world := mpi_world(env)) is not None:
        return _of_mpi(env, world)
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))  # of a batch script, 1 of many tasks
    if size > 1:
        return _of_slurm(env, size)
    return Place()


def _rendezvous(env: Mapping[str, str]) -> tuple[str, int]:
    if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
        raise UserError(
            "expected MASTER_ADDR and MASTER_PORT, where rank 0 listens, beside RANK and WORLD_SIZE, found "
            f"MASTER_ADDR={env.get('MASTER_ADDR', '')} MASTER_PORT={env.get('MASTER_PORT', '')}"
        )
    return env["MASTER_ADDR"], _number(env, "MASTER_PORT")


def _of_mpi(env: Mapping[str, str], world: Any) -> Place:
    size, local = world.Get_size(), world.Split_type(sys.modules["mpi4py.MPI"].COMM_TYPE_SHARED)
    one_host = local.Get_size() == size
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_host else socket.gethostname())
    address = world.bcast(address)
    port = world.bcast(_number(env, "MASTER_PORT", 0))
    return Place("mpiexec", world.Get_rank(), size, local.Get_rank(), local.Get_size(), address, port, mpi=world)


def _of_slurm(env: Mapping[str, str], size: int) -> Place:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    address = env.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise UserError(f"expected SLURM_STEP_NODELIST beside SLURM_NTASKS={size}, found none; start with srun")
    job = _number(env, "SLURM_JOB_ID", 0) + 97 * _number(env, "SLURM_STEP_ID", 0)
    port = _number(env, "MASTER_PORT", SLURM_PORTS[job % len(SLURM_PORTS)])  # the same on every host, no word exchanged
    local_rank = _number(env, "SLURM_LOCALID")
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = max(int(tasks[0]) if tasks else 1, local_rank + 1)
    return Place("srun", _number(env, "SLURM_PROCID"), size, local_rank, local_size, address, port)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: `a[03-07,9],b` begins with a03."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"expected the variable {name}, which the launcher sets, found none")
    if not value.isdigit() or (name in WORLD_SIZE_VARIABLES and value == "0"):
        raise UserError(f"expected a number of processes or a rank, found {name}={value}; unset it, or set it right")
    return int(value)

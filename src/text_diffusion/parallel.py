"""A network on several ranks by torch's engines: DDP (a whole copy each) or FSDP2 (a shard of every parameter each).

Both sum gradients while the backward pass still runs, and both must see every use of a parameter within the forward of
one module: hence the loss of a batch is a module here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from text_diffusion.distributed import Ranks
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.objectives import Objective, Terms

M = TypeVar("M", bound=nn.Module)
BUCKET = 2**24  # numbers of sharded tensors that are exchanged at once, unless one is larger


class BatchLoss(nn.Module):
    """The terms of the loss of sentences w (b, L) at timesteps t (b,).

    Args:
        network: compiled or not.
        objective: whose loss it is.
        diffusion: the process.
    """

    def __init__(self, network: Any, objective: Objective, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.network, self.loss, self.diffusion = network, objective.loss, diffusion

    def forward(self, input_ids: Tensor, t: Tensor, noise: Noise, condition: Tensor | None = None) -> Terms:
        """Each term (b,)."""
        return self.loss(self.network, self.diffusion, input_ids, t, noise, condition)


def check_shares(batch_size: int, ranks: Ranks) -> None:
    """Refuse a batch that the ranks cannot share equally in pairs (self-conditioning takes every second sentence).

    Raises:
        UserError: naming the nearest batch sizes that they can.
    """
    unit = 2 * ranks.size
    if ranks.size > 1 and batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(
            f"--batch_size must be a multiple of {unit} for {ranks.size} processes to share it, found {batch_size}; "
            f"the nearest: {nearest} (a run keeps its batch size: for one that is under way change the processes)"
        )


def parallelised(loss: BatchLoss, parallel: str, ranks: Ranks) -> nn.Module:
    """The loss whose backward pass leaves the mean of the ranks' gradients in each parameter."""
    if ranks.size == 1 or parallel == "fsdp":  # sharded when it was made
        return loss
    # The parameters are the same already: `synchronise` has seen to that.
    return DistributedDataParallel(loss, init_sync=False, gradient_as_bucket_view=True)


def shard(module: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Leave a shard of every parameter on this rank (FSDP2): each layer is put together when it is needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    for layers in [child for child in module.modules() if isinstance(child, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


@contextmanager
def summing(loss: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of micro-batches stay on their rank until the last one."""
    if hasattr(loss, "set_requires_gradient_sync"):  # of FSDP2
        loss.set_requires_gradient_sync(last)  # type: ignore[operator]
    with loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext():
        yield


def whole(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tensors that may be sharded by rows, each put together, in turn; then all ranks must ask for the same.

    Rank r has rows r c to (r + 1) c - 1 of n, c = ceil(n / ranks). Many are exchanged at once, as small ones take long.
    """
    bucket: list[Tensor] = []
    for tensor in tensors:
        if _is_dtensor(tensor):
            bucket.append(tensor)
            if sum(one.numel() for one in bucket) <= BUCKET:
                continue
        yield from _gathered(bucket)
        bucket = []
        if not _is_dtensor(tensor):
            yield tensor
    yield from _gathered(bucket)


@torch.no_grad()
def _gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Sharded tensors of one kind of number, put together in one exchange."""
    if not tensors:
        return []
    mesh = tensors[0].device_mesh  # type: ignore[attr-defined]
    rows = [-(-tensor.shape[0] // mesh.size()) for tensor in tensors]
    sizes = [c * tensor[:1].numel() for c, tensor in zip(rows, tensors, strict=True)]  # the last rank may have fewer
    shards = [local(tensor).flatten() for tensor in tensors]
    mine = torch.cat([F.pad(shard, (0, size - len(shard))) for shard, size in zip(shards, sizes, strict=True)])
    every = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(every, mine, group=mesh.get_group())
    parts = zip(torch.stack(every).split_with_sizes(sizes, dim=1), tensors, strict=True)
    return [part.reshape(-1, *tensor.shape[1:])[: tensor.shape[0]] for part, tensor in parts]


def summed(number: Tensor) -> Tensor:
    """A number that may lie in parts on the ranks (a norm of what is sharded), as a whole; then all ranks must ask."""
    full: Tensor = getattr(number, "full_tensor", lambda: number)()
    return full


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, in the same memory."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def synchronise(modules: list[nn.Module], ranks: Ranks) -> None:
    """Give every rank rank 0's parameters, and look whether they have arrived.

    Raises:
        UserError: they have not.
    """
    if ranks.size == 1:
        return
    digest = hashlib.sha256()
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        dist.broadcast(parameter.data, src=0)
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    ranks.agree("parameters", {"their checksum": digest.hexdigest()})


def whole_copy(model: M, make: Callable[[], M]) -> M:
    """The model, or, if it is sharded, a whole copy of it in a new one; then all ranks must ask for it."""
    if not is_sharded(model):
        return model
    fresh = make()
    with torch.no_grad():
        for target, source in zip(fresh.parameters(), whole(list(model.parameters())), strict=True):
            target.copy_(source)
    return fresh.eval().requires_grad_(False)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has left this rank a shard of every parameter."""
    return any(_is_dtensor(parameter) for parameter in model.parameters())


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, on this rank's device; or sharded as the parameter is."""
    if not _is_dtensor(parameter):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # nothing is sent


def _is_dtensor(tensor: Tensor) -> bool:
    """Whether it is torch's sharded kind, whose module takes a second to import and is needed under FSDP only."""
    return hasattr(tensor, "full_tensor")

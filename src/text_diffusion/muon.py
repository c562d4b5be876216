"""Muon: what a matrix is changed by is turned until all its singular values are nearly one (Jordan et al. 2024).

    M <- mu M + G,   U = G + mu M                                                                                 (1)
    X = U / |U|, then five times  X <- a X + b (X X^T) X + c (X X^T)^2 X   (Newton-Schulz)                        (2)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) X                                                       (3)

for the weights W (m, n) of linear layers, G being the gradient. The factor in (3) makes the change as large as AdamW's
(Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning rate serves both: what is no such weight (embeddings
and the head tied to them, norms, biases) is left to AdamW. (2) is computed in bf16 on a GPU, which is accurate enough,
and in float32 elsewhere: a CPU without bf16 units is hundreds of times slower at it, which is why this is not
`torch.optim.Muon`. Of matrices in shards (FSDP) every rank puts U together, turns it, and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from text_diffusion.config import TrainConfig
from text_diffusion.parallel import sharded_like, whole

MOMENTUM = 0.95  # mu
MOMENT = "momentum"  # M in the optimizer's state
A, B, C = 3.4445, -4.775, 2.0315
ITERATIONS = 5
LIKE_ADAMW = 0.2


def orthogonal(U: Tensor) -> Tensor:
    """The matrix with U's singular vectors whose singular values are about one, eq. (2); each of U (K, m, n)."""
    wide = U.shape[-2] <= U.shape[-1]
    X = U if wide else U.mT
    X = X.bfloat16() if X.is_cuda else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        S = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(S, S, S, beta=B, alpha=C), X, beta=A)
    return (X if wide else X.mT).to(U.dtype)


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights of a network that Muon is for: those of linear layers, but for heads tied to embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return [weight for weight in linear if id(weight) not in embeddings and weight.requires_grad]


class Muon(torch.optim.AdamW):
    """Eq. (1) to (3) for some parameters, AdamW for the others.

    Args:
        parameters: all that are trained.
        turned: those among them that (1) to (3) are for, (m, n) each.
        options: AdamW's: lr, weight_decay, fused.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], turned: Iterable[Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.turned = list(turned)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; matrices of one shape are turned together."""
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        gradients = [W.grad for W in self.turned]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for W in self.turned:
            if W.grad is not None:
                by_shape.setdefault(W.shape, []).append(W)
        for shape, together in by_shape.items():
            G = [W.grad for W in together if W.grad is not None]
            M = [self._momentum(W) for W in together]
            torch._foreach_mul_(M, MOMENTUM)
            torch._foreach_add_(M, G)
            U = torch._foreach_add(G, M, alpha=MOMENTUM)
            X = orthogonal(torch.stack(list(whole(U))))
            change = [sharded_like(W, one) for W, one in zip(together, X.unbind(), strict=True)]
            torch._foreach_mul_(together, 1 - lr * decay)
            torch._foreach_add_(together, change, alpha=-lr * LIKE_ADAMW * max(shape) ** 0.5)
        for W in self.turned:
            W.grad = None  # AdamW passes over what has none
        loss = super().step(closure)
        for W, gradient in zip(self.turned, gradients, strict=True):
            W.grad = gradient
        return loss

    def _momentum(self, W: Tensor) -> Tensor:
        """M, zero at first; AdamW expects a number of steps beside it when the state is read."""
        state = self.state[W]
        if MOMENT not in state:
            state |= {"step": torch.zeros((), device=W.device), MOMENT: torch.zeros_like(W)}
        M: Tensor = state[MOMENT]
        return M


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """The names of what the optimizer keeps of a parameter, each as large as it; besides, it counts its steps."""
    turned = isinstance(optimizer, Muon) and any(parameter is W for W in optimizer.turned)
    return (MOMENT,) if turned else ("exp_avg", "exp_avg_sq")


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What trains a network: `--optimizer`, with its learning rate (set anew at every step) and weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = trained[0].device.type != "mps"
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    if config.optimizer == "muon":
        return Muon(trained, matrices(model), **options)
    return torch.optim.AdamW(trained, **options)

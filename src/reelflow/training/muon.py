"""Muon, for matrices and convolution weights. On the small VAE it needs about half the steps of AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Muon, Jordan et al. 2024), for weights seen as matrices.

    The update's root mean square is 0.2, as with Adam, so both take the same learning rate (Liu et al. 2025). Under
    torch.distributed every rank orthogonalises its share of the matrices; gradients have to be averaged before.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the trainer has none
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for members in shapes.values():
                updates = []
                for p in members:
                    assert p.grad is not None
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]).flatten(1))
                for p, update in zip(members, shared(torch.stack(updates)), strict=True):
                    p.add_(update.view(p.shape), alpha=-0.2 * max(update.shape) ** 0.5 * group["lr"])


def shared(x: Tensor) -> Tensor:
    """`orthogonal`, the matrices dealt out over the ranks."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if ranks == 1:
        return orthogonal(x)
    found = torch.zeros_like(x)
    if rank < len(x):
        found[rank::ranks] = orthogonal(x[rank::ranks])
    dist.all_reduce(found)
    return found


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, R, C) with their singular values moved to about 1, by Newton-Schulz iteration in bfloat16."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.mT if tall else y).float()

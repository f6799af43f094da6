"""Muon, for matrices and convolution weights. On the small VAE it needs about half the steps of AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Muon, Jordan et al. 2024), for weights seen as matrices.

    The update's root mean square is 0.2, as with Adam, so both take the same learning rate (Liu et al. 2025). Under
    torch.distributed every rank orthogonalises its share of the matrices, of sharded ones gathered for it; gradients have to
    be averaged before.
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
                    update = p.grad.lerp(mean, group["momentum"])
                    updates.append(update.to_local() if isinstance(update, DTensor) else update.flatten(1))
                first = members[0]
                stacked = torch.stack(updates)
                found = resharded(stacked, first) if isinstance(first, DTensor) else shared(stacked)
                scale = -0.2 * max(first.shape[0], first.numel() // first.shape[0]) ** 0.5 * group["lr"]
                for p, update in zip(members, found, strict=True):
                    own = p.to_local() if isinstance(p, DTensor) else p
                    own.add_(update.view(own.shape), alpha=scale)


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


def resharded(x_NrC: Tensor, like: DTensor) -> Tensor:
    """`orthogonal` of matrices of which every rank holds some rows: each rank is sent its share of them whole, and sends the
    rows back.

    Args:
        x_NrC: this rank's rows of N matrices.
        like: one of the sharded matrices (R, C); rows are split as `torch.chunk` does.
    """
    mesh = like.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    ranks, rows = dist.get_world_size(group), like.shape[0]
    part = -(-rows // ranks)
    turns = -(-len(x_NrC) // ranks)
    sent = x_NrC.new_zeros(turns * ranks, part, x_NrC.shape[2], dtype=torch.bfloat16)
    sent[: len(x_NrC), : x_NrC.shape[1]] = x_NrC
    sent = sent.unflatten(0, (turns, ranks)).transpose(0, 1).contiguous()  # matrix t · ranks + r belongs to rank r
    whole = torch.empty_like(sent)
    dist.all_to_all_single(whole, sent, group=group)
    matrices = whole.transpose(0, 1).flatten(1, 2)  # (turns, ranks · part, C), padding at the end
    found = torch.zeros_like(matrices)
    found[:, :rows] = orthogonal(matrices[:, :rows]).bfloat16()
    back = found.unflatten(1, (ranks, part)).transpose(0, 1).contiguous()
    dist.all_to_all_single(sent, back, group=group)
    return sent.transpose(0, 1).flatten(0, 1)[: len(x_NrC), : x_NrC.shape[1]].float()


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, R, C) with their singular values moved to about 1, by Newton-Schulz iteration in bfloat16."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.mT if tall else y).float()

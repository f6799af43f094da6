"""One model on several devices, one process (rank) each: started by torchrun, every process makes the same calls.

The ranks are a grid of `branches` × `tensor`. The conditional and the unconditional branch of guidance belong to different
rows of it; the ranks of a row hold a share of the deep block's layers each (whole heads, and columns of the MLP). Only
(shift, scale) and the sums inside a layer travel; everything else each rank knows for itself.

Shapes: B clips of a branch, n tokens of a pass, C latent channels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reelflow.flow.affine import Affine, wide

if TYPE_CHECKING:
    from reelflow.flow.attention import Attention


@dataclass(frozen=True)
class Ranks:
    """This process among those that run a model together; by default it is alone."""

    branches: int = 1
    tensor: int = 1
    rank: int = 0
    device: str | torch.device = "cpu"

    @property
    def size(self) -> int:
        return self.branches * self.tensor

    @property
    def branch(self) -> int:
        return self.rank // self.tensor

    def agree(self, seed: int, request: object) -> int:
        """The first rank's seed. Raises ValueError, on every rank, where their requests differ (in their `repr`)."""
        if self.size == 1:
            return seed
        told = torch.zeros(self.size, 2, dtype=torch.long, device=self.device)
        told[self.rank] = torch.tensor((seed, zlib.crc32(repr(request).encode())))
        dist.all_reduce(told)
        seeds, requests = told.T.tolist()
        if len(set(requests)) > 1:
            raise ValueError("the processes ask for different clips; under torchrun all of them make the same call, for one clip together")
        return int(seeds[0])

    def part(self, rows: int) -> slice:
        """This rank's share of so many independent rows; the last ones may have none."""
        return slice(-(-rows * self.rank // self.size), -(-rows * (self.rank + 1) // self.size))

    def whole(self, part: Tensor, rows: int) -> Tensor:
        """All rows from every rank's `part` of them."""
        if self.size == 1:
            return part
        found = part.new_zeros(rows, *part.shape[1:])
        found[self.part(rows)] = part
        dist.all_reduce(found)
        return found


class Exchange:
    """(shift, scale) of every branch, on every rank, from that of its own: bitwise the same everywhere, so that all of them
    decide alike. One all-reduce of a buffer made once; the host does not look.

    Args:
        branches: of guidance that are computed, 1 or 2.
        values: of all branches together, at most.
        weight: of their precision, where they are.
    """

    def __init__(self, ranks: Ranks, branches: int, values: int, weight: Tensor):
        self.ranks, self.split = ranks, min(branches, ranks.branches)
        self.buffer = wide(weight.new_empty(values if ranks.size > 1 else 0))

    def own(self, rows: Tensor) -> Tensor:
        """This rank's branch, of rows for all of them, the conditional ones first."""
        return rows.chunk(self.split)[self.ranks.branch % self.split]

    def __call__(self, own: Affine) -> Affine:
        """All rows, (branches · B, n, C), from this rank's."""
        if self.ranks.size == 1:
            return own
        shape = (self.split, 2, *own.shift.shape)
        every = self.buffer[: prod(shape)].view(shape).zero_()
        if self.ranks.rank % self.ranks.tensor == 0 and self.ranks.branch < self.split:
            torch.stack(tuple(own), out=every[self.ranks.branch])
        dist.all_reduce(every)
        return Affine(*every.transpose(0, 1).flatten(1, 2))


def share_layers(layers: nn.ModuleList, ranks: Ranks) -> None:
    """Leave each rank its share of transformer layers: tensor parallelism, two sums over the ranks of a row per layer.

    The residual stays whole on every rank: a pass is of 1 … 256 tokens, so that its norms cost nothing to speak of, its number
    of tokens need not divide, and sums travel as far as parts gathered and scattered would.

    Raises:
        ValueError: layers whose weights are not plain tensors.
    """
    if ranks.tensor == 1:
        return
    if any(type(weight.data) is not Tensor for layer in layers for weight in layer.parameters()):
        raise ValueError(f"quantised layers cannot be shared out; use precision bfloat16, or {ranks.branches} processes")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.branches, ranks.tensor), mesh_dim_names=("branch", "tensor"))["tensor"]
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("attention.qkv", "mlp.gate", "mlp.up")}
    plan |= {name: RowwiseParallel() for name in ("attention.proj", "mlp.down")}
    for layer in layers:
        attention = cast("Attention", layer.attention)
        group_heads(attention, ranks.tensor)
        linear = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        parallelize_module(layer, mesh, {name: style for name, style in plan.items() if name in linear}, src_data_rank=None)
        attention.heads, attention.kv_heads = attention.heads // ranks.tensor, attention.kv_heads // ranks.tensor


@torch.no_grad()
def group_heads(attention: Attention, ranks: int) -> None:
    """Reorder the rows `[queries ‖ keys ‖ values]` so that a contiguous share of them has queries, keys and values that go together."""
    rows = torch.arange(attention.qkv.out_features, device=attention.qkv.weight.device).unflatten(0, (-1, attention.head_dim))
    parts = [kind.chunk(ranks) for kind in rows.split((attention.heads, attention.kv_heads, attention.kv_heads))]
    order = torch.cat([torch.cat(own) for own in zip(*parts, strict=True)]).flatten()
    for parameter in attention.qkv.parameters():
        parameter.data = parameter[order]  # not in place: it may be mapped from a file

"""Attention with a quick way back on CPUs, where torch's own (2.13) takes several times as long as its products.

Queries are taken a tile at a time, with the keys that it sees: two products and a softmax forward, and five products on the way back,
where the shares are computed again, so that memory grows with the length alone. Products and shares are in bfloat16.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reelflow.flow import attention as flow
from reelflow.flow.attention import Attend, Layer
from reelflow.flow.rope import Rotary

TILE = 128


def causal(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """As in `flow.attention`; tiled where that is quicker."""
    return _tiled(q_BHTD, k_BHTD, v_BHTD, True) if _quicker(q_BHTD, k_BHTD) else flow.causal(q_BHTD, k_BHTD, v_BHTD)


def attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """As in `flow.attention`, of all keys; tiled where that is quicker."""
    return _tiled(q_BHTD, k_BHTD, v_BHTD, False) if _quicker(q_BHTD, k_BHTD) else flow.attention(q_BHTD, k_BHTD, v_BHTD)


def attend_quickly(layer: Layer) -> None:
    """Let a layer's causal attention be the one above."""
    run = layer.forward

    def forward(x_BTM: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        return run(x_BTM, rotary, causal if attend is flow.causal else attend)

    layer.forward = forward  # type: ignore[method-assign]  # on this layer only; names of weights stay


def _quicker(q_BHTD: Tensor, k_BHTD: Tensor) -> bool:
    """On a CPU in bfloat16, with as many key heads as query heads."""
    return q_BHTD.device.type == "cpu" and torch.is_autocast_enabled("cpu") and q_BHTD.shape[1] == k_BHTD.shape[1]


def _tiled(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, causal: bool) -> Tensor:
    mixed: Tensor = _Tiled.apply(q_BHTD.bfloat16(), k_BHTD.bfloat16(), v_BHTD.bfloat16(), causal)
    return mixed


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, causal: bool) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (x.contiguous() for x in (q_BHTD * q_BHTD.shape[-1] ** -0.5, k_BHTD, v_BHTD))
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD)
        ctx.causal = causal
        mixed_BHTD = torch.empty_like(q_BHTD)
        for own, seen, share in _shares(q_BHTD, k_BHTD, causal):
            mixed_BHTD[:, :, own] = share @ v_BHTD[:, :, seen]
        return mixed_BHTD

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q_BHTD, k_BHTD, v_BHTD), slope_BHTD = ctx.saved_tensors, slopes[0].contiguous()
        q_slope, k_slope, v_slope = torch.empty_like(q_BHTD), torch.zeros_like(k_BHTD), torch.zeros_like(v_BHTD)
        for own, seen, share in _shares(q_BHTD, k_BHTD, ctx.causal):
            v_slope[:, :, seen] += share.mT @ slope_BHTD[:, :, own]
            of_share = slope_BHTD[:, :, own] @ v_BHTD[:, :, seen].mT
            of_score = torch._softmax_backward_data(of_share, share, -1, share.dtype)
            q_slope[:, :, own] = of_score @ k_BHTD[:, :, seen]
            k_slope[:, :, seen] += of_score.mT @ q_BHTD[:, :, own]
        return q_slope.mul_(q_BHTD.shape[-1] ** -0.5), k_slope, v_slope, None


def _shares(q_BHTD: Tensor, k_BHTD: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of every tile: its queries, the keys that they see, and how they share their attention among these (B, H, own, seen)."""
    for start in range(0, q_BHTD.shape[2], TILE):
        own = slice(start, min(start + TILE, q_BHTD.shape[2]))
        seen = slice(0, own.stop if causal else k_BHTD.shape[2])
        score = q_BHTD[:, :, own] @ k_BHTD[:, :, seen].mT
        if causal:
            later = torch.ones(score.shape[2], score.shape[2], dtype=torch.bool).triu(1)
            score[..., own].masked_fill_(later, float("-inf"))
        yield own, seen, score.softmax(-1)

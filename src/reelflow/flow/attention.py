"""Transformer layers, and how their tokens see each other.

A layer knows nothing of masks or caches: it is given an `Attend`, a function of (queries, keys, values).

Shapes: B batch, T tokens, M model width, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reelflow.config import FlowConfig
from reelflow.flow.affine import wide
from reelflow.flow.rope import Rotary

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; fewer key heads than query heads are shared among neighbouring queries."""
    with torch.autocast(q_BHTD.device.type, enabled=False):  # in the precision it is given
        grouped = q_BHTD.shape[1] != k_BHTD.shape[1]
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def causal(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Every token sees itself and those before it."""
    return attention(q_BHTD, k_BHTD, v_BHTD, causal=True)


def frame_window(text: int, frames: int, places: int, look_ahead: int, window: int | None) -> Attend:
    """The denoiser's view: frame f sees all text and frames f + A − 1 − G … f + A − 1; text sees text and frames 0 … A − 1.

    Every frame is one dense attention over a slice of the keys, so no mask exists. `places`: tokens of a frame.
    """

    def run(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        def view(x: Tensor, first: int, last: int) -> Tensor:
            if first == 0:
                return x[:, :, : text + last * places]
            return torch.cat((x[:, :, :text], x[:, :, text + first * places : text + last * places]), 2)

        parts = []
        for f in range(-1 if text else 0, frames):
            query = q_BHTD[:, :, :text] if f < 0 else q_BHTD[:, :, text + f * places : text + (f + 1) * places]
            first = 0 if window is None or f < 0 else max(0, f + look_ahead - 1 - window)
            last = min(frames, max(f, 0) + look_ahead)
            parts.append(attention(query, view(k_BHTD, first, last), view(v_BHTD, first, last)))
        return torch.cat(parts, 2)

    return run


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, its weight stored as an offset from one (Gemma)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), self.weight.shape, 1 + wide(self.weight), self.eps).to(x.dtype)


class Projection(nn.Linear):
    """In and out projections: float32 also under autocast, for rounding here moves the flow's values themselves."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def norm(config: FlowConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.norm == "rms" else nn.LayerNorm(width, eps=1e-5)


class Attention(nn.Module):
    def __init__(self, config: FlowConfig, width: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.num_heads or width // config.head_dim
        self.kv_heads = config.num_kv_heads or self.heads
        inner = self.heads * self.head_dim
        self.norm = norm(config, width)
        self.qkv = nn.Linear(width, inner + 2 * self.kv_heads * self.head_dim, bias=config.bias)
        self.proj = nn.Linear(inner, width, bias=config.bias)
        self.query_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.post_norm = RMSNorm(width) if config.post_norm else nn.Identity()

    def project(self, x_BTM: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D), rotated."""
        qkv = self.qkv(self.norm(x_BTM).to(self.qkv.weight.dtype))
        if qkv.device.type == "cpu" and qkv.requires_grad:
            qkv = wide(qkv)  # the CPU's attention backward is four times slower in bfloat16 (torch 2.13), the forward about equal
        qkv = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        both, v_BHTD = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if isinstance(self.query_norm, RMSNorm):
            both = torch.cat((self.query_norm(both[:, : self.heads]), self.key_norm(both[:, self.heads :])), 1)
        if rotary is not None:
            both = rotary.rotate(both)
        q_BHTD, k_BHTD = both.split((self.heads, self.kv_heads), dim=1)
        return q_BHTD, k_BHTD, v_BHTD

    def merge(self, mixed_BHTD: Tensor) -> Tensor:
        """What the layer adds to the residual, (B, T, M)."""
        return self.post_norm(self.proj(mixed_BHTD.transpose(1, 2).flatten(2).to(self.proj.weight.dtype)))


class MLP(nn.Module):
    def __init__(self, config: FlowConfig, width: int):
        super().__init__()
        self.norm = norm(config, width)
        self.gate = nn.Linear(width, 4 * width, bias=config.bias) if config.mlp == "swiglu" else None
        self.up = nn.Linear(width, 4 * width, bias=config.bias)
        self.down = nn.Linear(4 * width, width, bias=config.bias)
        self.post_norm = RMSNorm(width) if config.post_norm else nn.Identity()

    def forward(self, x_BTM: Tensor) -> Tensor:
        x = self.norm(x_BTM).to(self.up.weight.dtype)
        hidden = F.gelu(self.up(x)) if self.gate is None else F.gelu(self.gate(x), approximate="tanh") * self.up(x)
        return self.post_norm(self.down(hidden))


class Layer(nn.Module):
    """Pre-norm transformer layer. The residual stream is float32 also where the products run in bfloat16."""

    def __init__(self, config: FlowConfig, width: int):
        super().__init__()
        self.attention = Attention(config, width)
        self.mlp = MLP(config, width)

    def forward(self, x_BTM: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        return self.finish(x_BTM, attend(*self.attention.project(x_BTM, rotary)))

    def finish(self, x_BTM: Tensor, mixed_BHTD: Tensor) -> Tensor:
        """The layer's output from its input and what its attention saw."""
        x_BTM = x_BTM + self.attention.merge(mixed_BHTD)
        return x_BTM + self.mlp(x_BTM)

"""`AutoencoderKLWan` over whole clips at once: differentiable, and several times faster than diffusers chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reelflow.adapters.wan_fast import WanPass, activate
from reelflow.adapters.wan_fast import channels_last as channels_last


def _activate(x: Tensor, gamma: Tensor) -> Tensor:
    """Norm and SiLU in float32."""
    return activate(x.float(), gamma).to(x.dtype)


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """`_activate` as one kernel, compiled at the first call (which takes a C++ compiler); three times faster."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_activate, dynamic=False)


def _fused(x: Tensor, gamma: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    torch._dynamo.mark_dynamic(rows, 0)
    return _compiled()(rows, gamma).view(x.shape)


def one_pass(vae: Any, fused: bool = False) -> WanPass:
    """Every call encodes or decodes whole clips, with gradients. fused: compile the norms (a C++ compiler is needed)."""
    return WanPass(vae, stream=False, activate=_fused if fused else _activate)

"""Tiny flows of every kind, with random weights in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reelflow.config import FlowConfig
from reelflow.flow import StarFlow

HEIGHT, WIDTH = 2, 3
BASE: dict[str, Any] = {
    "channels": 2, "width": 24, "deep_width": 48, "layers": (1, 1, 2), "head_dim": 24, "window": 3, "text_tokens": 3, "text_dim": 5,
    "position_span": 4, "denoiser": {"layers": 2, "width": 24, "window": 2},
}  # fmt: skip
IMAGE: dict[str, Any] = {"window": 1, "denoiser": None, "layers": (1, 2, 1)}
NO_TEXT: dict[str, Any] = {"text_tokens": 0, "text_dim": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "video": {},
    "no start token": {"sos": False},
    "exp scale": {"scale": "exp", "soft_clip": 2.0},
    "no soft clip": {"soft_clip": 0.0},
    "swiglu": {"mlp": "swiglu"},
    "rms norm": {"norm": "rms"},
    "qk norm": {"qk_norm": True},
    "post norm": {"post_norm": True},
    "grouped queries": {"num_heads": 4, "num_kv_heads": 2},
    "no bias": {"bias": False},
    "rotary on halves": {"positions": "rotary_half"},
    "places of a frame": {"learned_places": HEIGHT * WIDTH},
    "no text": NO_TEXT,
    "image": IMAGE,
    "image without text": {**IMAGE, **NO_TEXT},
    "learned positions": {**IMAGE, "positions": "learned", "learned_places": HEIGHT * WIDTH},
    "all together": {
        **IMAGE, "positions": "learned", "learned_places": HEIGHT * WIDTH, "sos": False, "scale": "exp", "mlp": "swiglu", "norm": "rms",
        "qk_norm": True, "post_norm": True, "num_heads": 4, "num_kv_heads": 1, "bias": False,
    },
}  # fmt: skip


class Tiny(NamedTuple):
    """A model with an input: x (2, window, C, h, w), and text (2, L, E) where it reads one."""

    model: StarFlow
    x: Tensor
    text: Tensor | None


def make_tiny(batch: int = 2, frames: int | None = None, **changes: Any) -> Tiny:
    """A flow of `BASE` with changes; every weight is random, so that nothing hides behind a zero."""
    config = FlowConfig(**BASE | changes)
    generator = torch.Generator().manual_seed(1)
    model = StarFlow(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.mul_("norm" in name).add_(spread * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(batch, frames or config.window, config.channels, HEIGHT, WIDTH, generator=generator).double()
    text = torch.randn(batch, config.text_tokens, config.text_dim, generator=generator).double() if config.text_dim else None
    return Tiny(model.eval(), x, text)


@pytest.fixture(params=OPTIONS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """One flow for each option of `FlowConfig`."""
    return make_tiny(**OPTIONS[request.param])


@pytest.fixture(scope="session")
def build() -> Callable[..., Tiny]:
    return make_tiny


@pytest.fixture(scope="session")
def options() -> dict[str, dict[str, Any]]:
    return OPTIONS



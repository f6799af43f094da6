"""Removing the data noise: Tweedie against finite differences, and the learned denoiser in chunks.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reelflow.config import FlowConfig
from reelflow.denoise import denoise, tweedie
from reelflow.evaluation.golden import load
from reelflow.flow import StarFlow
from reelflow.likelihood import log_prob


def make_flow(window: int, denoiser: dict[str, Any]) -> StarFlow:
    """A random video flow with a denoiser, without text."""
    config = FlowConfig(
        channels=2, width=24, deep_width=24, layers=(1,), head_dim=24, position_span=4, window=window,
        denoiser={"layers": 1, "width": 24} | denoiser,
    )  # fmt: skip
    model = StarFlow(config).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def test_tweedie_is_a_step_along_the_slope_of_log_p(golden: Path) -> None:
    found = load(golden / "starflow_v_mini")
    model, x, text = found.model.double(), found.inputs["x"][:, :2, :, :2, :2].double(), found.inputs["text"].double()
    variance, step = model.config.noise_std**2, 1e-5
    moved = tweedie(model, x, text) - x
    for _ in range(3):
        direction = torch.randn_like(x)
        with torch.no_grad():
            ends = [log_prob(model, x + sign * step * direction, text).total for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((moved * direction).sum((1, 2, 3, 4)), variance * slope, atol=1e-6, rtol=1e-6)


def test_tweedie_of_a_gaussian_is_its_posterior_mean() -> None:
    """The untrained flow is N(0, 1), of which σ² is noise: E[clean | x] = (1 − σ²) x."""
    model = StarFlow(FlowConfig(channels=2, width=16, deep_width=16, layers=(1,), head_dim=16, position_span=4, noise_std=0.5))
    x = torch.randn(2, 1, 2, 3, 3)
    torch.testing.assert_close(denoise(model, x, None), 0.75 * x)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_within_the_window_it_is_one_step_of_the_score() -> None:
    model, x = make_flow(3, {}), torch.randn(2, 3, 2, 2, 2).double()
    assert torch.equal(denoise(model, x, None), x - 0.3 * model.score(x))


def test_chunks_equal_the_whole_where_the_context_covers_what_a_frame_sees() -> None:
    """One layer, no look-ahead, two frames back: every frame of a chunk behind its context sees all it would see anyway."""
    model, x = make_flow(4, {"look_ahead": 1, "window": 2}), torch.randn(1, 9, 2, 2, 2).double()
    with torch.no_grad():
        torch.testing.assert_close(denoise(model, x, None), x - 0.3 * model.score(x), atol=1e-5, rtol=0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 30), window=st.integers(1, 8), context=st.none() | st.integers(1, 10))
def test_chunks_cover_every_frame_once(monkeypatch: pytest.MonkeyPatch, frames: int, window: int, context: int | None) -> None:
    """Every chunk but the last is a full window; each starts with `denoiser_window` frames that are done already."""
    model = make_flow(window, {"window": context})
    chunks: list[list[int]] = []

    def score(x: Tensor, text: Tensor | None = None) -> Tensor:
        chunks.append(x[0, :, 0, 0, 0].int().tolist())
        return torch.full_like(x, len(chunks))

    monkeypatch.setattr(model, "score", score)
    x = torch.arange(frames).float().reshape(1, -1, 1, 1, 1).expand(-1, -1, 2, -1, -1)
    taken = ((x - denoise(model, x, None)) / 0.3).round().int()[0, :, 0, 0, 0].tolist()
    overlap = min(context or window - 1, window - 1)
    for index, chunk in enumerate(chunks):
        start = index * (window - overlap)
        assert chunk == list(range(start, min(start + window, frames)))
    wanted = [next(number for number, chunk in enumerate(chunks, 1) if frame in chunk) for frame in range(frames)]
    assert taken == wanted

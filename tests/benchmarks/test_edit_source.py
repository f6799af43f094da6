"""A flow that copies its source loses all of another one's bits, one that goes by the past alone none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import edit_source
import pytest
import torch
from torch import Tensor


def pipe(expected: Any) -> Any:
    """Of a flow that expects `expected(source, target)` of the target, with one pixel of each fourth frame for latents."""

    def flow(x_BFChw: Tensor, text: None) -> tuple[Tensor, Tensor]:
        source, target = x_BFChw.chunk(2, 1)
        return torch.cat((0 * source, target - expected(source, target)), 1), torch.zeros_like(x_BFChw)

    def encode(frames_BFHW3: Tensor) -> Tensor:
        return frames_BFHW3[:, ::4, ::16, ::16].float().mean(-1)[:, :, None] / 64

    flow_like = type("Flow", (), {"__call__": staticmethod(flow), "config": SimpleNamespace(noise_std=0.01)})()
    return SimpleNamespace(
        flow=flow_like, codec=SimpleNamespace(encode=encode), device="cpu", prompting=SimpleNamespace(states=lambda *words, **more: None)
    )


def test_what_the_source_saves() -> None:
    edits = edit_source.pairs(4)
    plain, astray = edit_source.gains(pipe(lambda source, target: source), edits)
    assert len(plain) == 9
    assert min(*plain, astray) > 1
    past = lambda source, target: target.roll(1, 1)  # noqa: E731
    assert edit_source.gains(pipe(past), edits) == (9 * [0.0], pytest.approx(0.0))


def test_a_slowed_motion_comes_back_where_it_turns() -> None:
    frames = torch.arange(9.0)[None, :, None, None, None]
    assert edit_source.slowed(frames, 5).flatten().tolist() == [0, 1, 1, 2, 2, 5, 6, 7, 8]

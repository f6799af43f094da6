"""The affine step and guidance against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from reelflow.config import FlowConfig
from reelflow.flow import Affine, guide
from reelflow.flow.affine import parameters


def config(**changes: Any) -> FlowConfig:
    return FlowConfig(**{"channels": 2, "width": 16, "deep_width": 16, "layers": (1,), "head_dim": 16, "position_span": 4} | changes)


def test_parameters_by_hand() -> None:
    raw = torch.tensor([0.0, 3.0, -1.0, 100.0])
    clipped = [4 * math.tanh(value / 4) for value in raw.tolist()]
    found = parameters(raw, config())
    scale = [math.log1p(math.exp(a + 0.541324854612918)) for a in clipped[:2]]
    torch.testing.assert_close(found.scale, torch.tensor(scale))
    torch.testing.assert_close(found.shift, torch.tensor(clipped[2:]))
    assert found.scale[0] == pytest.approx(1.0, abs=1e-7)
    torch.testing.assert_close(parameters(raw, config(scale="exp", soft_clip=0)).scale, raw[:2].exp())


def test_parameters_are_float32_at_least() -> None:
    assert parameters(torch.zeros(4, dtype=torch.bfloat16), config()).scale.dtype == torch.float32
    assert parameters(torch.zeros(4, dtype=torch.float64), config()).scale.dtype == torch.float64


def test_step_and_back() -> None:
    step, x = Affine(torch.randn(5).double(), torch.rand(5).double() + 0.1), torch.randn(5).double()
    z, log_det = step.forward(x)
    torch.testing.assert_close(step.inverse(z), x)
    slope = torch.autograd.functional.jacobian(lambda x: step.forward(x)[0], x).diagonal()
    torch.testing.assert_close(log_det, slope.abs().log())


@pytest.mark.parametrize("weight", [0.5, 3.5, 20.0])
def test_guidance_is_a_product_of_gaussians(weight: float) -> None:
    """∝ N(μ_c, σ_c)^(1 + w) / N(μ_u, σ_u)^w where σ_u ≥ σ_c; a narrower unconditional is taken to be as wide as σ_c."""
    shift = torch.randn(2, 1000).double()
    scale = torch.rand(2, 1000).double() + 0.2
    found = guide(Affine(shift[0], scale[0]), Affine(shift[1], scale[1]), weight)
    wide = torch.maximum(scale[0], scale[1])
    precision = (1 + weight) / scale[0] ** 2 - weight / wide**2
    torch.testing.assert_close(found.scale, precision.rsqrt())
    torch.testing.assert_close(found.shift, ((1 + weight) * shift[0] / scale[0] ** 2 - weight * shift[1] / wide**2) / precision)
    clipped = scale[1] < scale[0]
    assert clipped.any()
    torch.testing.assert_close(found.scale[clipped], scale[0][clipped])


def test_guidance_of_weight_zero_is_the_conditional() -> None:
    conditional, unconditional = (Affine(torch.randn(50), torch.rand(50) + 0.1) for _ in range(2))
    for found, wanted in zip(guide(conditional, unconditional, 0.0), conditional, strict=True):
        assert torch.equal(found, wanted)

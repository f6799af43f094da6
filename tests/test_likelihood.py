"""log p in nats and bits: the change of variables by the autograd Jacobian, in float64.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from reelflow.config import FlowConfig
from reelflow.evaluation.golden import load
from reelflow.flow import StarFlow
from reelflow.likelihood import add_noise, log_prob


class Setting(NamedTuple):
    model: StarFlow
    x: Tensor
    text: Tensor


@pytest.fixture(params=["starflow_image_mini", "starflow_v_mini"])
def setting(request: pytest.FixtureRequest, golden: Path) -> Setting:
    """The models of the golden vectors in float64; two clips of at most 3 frames of 2 × 2 places."""
    found = load(golden / request.param)
    return Setting(found.model.double(), found.inputs["x"][:, :3, :, :2, :2].double(), found.inputs["text"].double())


def test_change_of_variables(setting: Setting) -> None:
    model, x, text = setting[0], setting.x[:1], setting.text[:1]
    slopes = torch.autograd.functional.jacobian(lambda x: model(x, text).z, x, vectorize=True).reshape(x.numel(), x.numel())
    normal = torch.distributions.Normal(torch.zeros_like(x), 1.0)
    wanted = normal.log_prob(model(x, text).z).sum() + slopes.det().abs().log()
    found = log_prob(model, x, text)
    torch.testing.assert_close(found.total, wanted[None], atol=1e-8, rtol=0)
    torch.testing.assert_close(found.bits_per_dim, -wanted[None] / math.log(2) / x.numel())


@torch.no_grad()
def test_shares_add_up_and_later_frames_change_nothing(setting: Setting) -> None:
    """per_frame[t] is log p(frame t | frames before it): the frames up to any t have their sum as log p."""
    model, x, text = setting
    found = log_prob(model, x, text)
    assert found.map.shape == (2, x.shape[1], 2, 2)
    torch.testing.assert_close(found.map.sum((2, 3)), found.per_frame)
    torch.testing.assert_close(found.per_frame.sum(1), found.total)
    for frames in range(1, x.shape[1] + 1):
        torch.testing.assert_close(log_prob(model, x[:, :frames], text).total, found.per_frame[:, :frames].sum(1))


@torch.no_grad()
def test_the_density_integrates_to_one() -> None:
    """Over a grid, for one channel at two places."""
    model = StarFlow(FlowConfig(channels=1, width=16, deep_width=16, layers=(1, 1), head_dim=16, position_span=4)).double()
    for parameter in model.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
    axis = torch.linspace(-12, 12, 241).double()
    x = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 1, 2)
    step = float(axis[1] - axis[0])
    assert float(log_prob(model, x).total.exp().sum()) * step**2 == pytest.approx(1.0, abs=1e-3)


def test_bits_per_dimension_by_hand() -> None:
    """An untrained flow is the identity: x = 0 has ½ log₂ 2π bits per value, x = 2 has 2 / log 2 more."""
    model = StarFlow(FlowConfig(channels=3, width=16, deep_width=16, layers=(1,), head_dim=16, position_span=4))
    with torch.no_grad():
        found = log_prob(model, torch.stack((torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.0))))
    torch.testing.assert_close(found.bits_per_dim, torch.tensor([1.3257480647, 1.3257480647 + 2.8853900818]))
    torch.testing.assert_close(found.total[0], torch.tensor(-12 * 0.9189385332))


def test_noise_is_seeded_and_as_wide_as_said() -> None:
    x = torch.randn(1, 2, 3, 32, 32)
    first, again, other = (add_noise(x, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float((first - x).std()) == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(add_noise(first, -0.5, torch.Generator().manual_seed(1)), x)

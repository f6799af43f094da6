"""The networks of Stable Video Diffusion with gradients: values and gradients of diffusers' own forward, in float64.

Shapes: R clips, F frames, C latent channels, h × w places.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reelflow.pipelines.svd.unet import Denoiser
from reelflow.training.svd.blocks import activation
from reelflow.training.svd.codec import TemporalPass
from reelflow.training.svd.unet import DEAD, flops, trained, velocity
from reelflow.training.svd.vae import latents_of, reconstruct

tiny = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "svd_tiny.py"))


def gradients(module: Any, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad()
    y = run()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_unet_has_the_values_and_gradients_of_diffusers(recompute: bool) -> None:
    unet = tiny["tiny_unet"]().double().requires_grad_(True)
    x, states = torch.randn(2, 3, 8, 8, 4).double(), torch.randn(2, 32).double()
    times, ids = torch.tensor([0.7, -1.2]).double(), torch.tensor([[6.0, 127.0, 0.02], [23.0, 40.0, 0.1]]).double()
    wanted, theirs = gradients(unet, lambda: unet(x, times, states[:, None], ids).sample)
    found, ours = gradients(unet, lambda: velocity(unet, x, times, states, ids, activation(), recompute))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # diffusers' embeddings of time are float32
    effective = trained(unet)
    for name, gradient in theirs.items():
        assert gradient is not None
        if name in effective:
            assert ours[name] is not None, name
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name
        else:
            assert any(part in name for part in DEAD)
            assert ours[name] is None
            assert gradient.abs().max() < 1e-9


def test_sampling_and_training_see_the_same_network() -> None:
    """With the norms as Stability has them."""
    unet, frames = tiny["tiny_unet"](), 3
    x, picture, states = torch.randn(1, frames, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 32)
    denoiser, ids, times = Denoiser(tiny["tiny_unet"]()), [6.0, 127.0, 0.02], torch.tensor([0.4])
    conditions = denoiser.conditions(picture, states, ids, times, frames, False, 1e-5)
    with torch.no_grad():
        wanted = denoiser(x, conditions, torch.zeros(1, dtype=torch.long))[0]
        seen = torch.cat((x, picture[:, None].expand_as(x)), 2)
        found = velocity(unet, seen, times, states, torch.tensor([ids]), activation(1e-5))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    other = velocity(unet, seen, times, states, torch.tensor([ids]), activation())
    assert not torch.allclose(other, wanted, atol=2e-5, rtol=1e-4)


def test_the_vae_has_the_values_and_gradients_of_diffusers() -> None:
    vae = tiny["tiny_vae"]().double().requires_grad_(True)
    x = torch.rand(2, 3, 3, 32, 48).double() * 2 - 1
    ours = TemporalPass(vae)
    wanted, theirs = gradients(vae, lambda: reconstruct(vae, x))
    found, own = gradients(vae, lambda: ours.decode(ours.encode(x).chunk(2, 1)[0]))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.encode(x).chunk(2, 1)[0], latents_of(vae, x))
    for name, gradient in theirs.items():
        assert (own[name] is None) == (gradient is None), name
        assert gradient is None or (own[name] - gradient).norm() <= 1e-7 * gradient.norm() + 1e-9, name


def test_arithmetic_is_counted_without_computing() -> None:
    unet = tiny["tiny_unet"]()
    one, two = flops(unet, 2, 8, 8), flops(unet, 4, 8, 8)
    assert 1.9 * one < two < 2.3 * one  # attention over frames grows faster
    assert one > 2 * sum(p.numel() for p in unet.parameters() if p.ndim >= 4)

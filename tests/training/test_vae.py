"""The small VAE: the one-pass function is the VAE's own, a step learns, a stopped run continues exactly, the export loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from reelflow.data.toybox import render, sample_scene
from reelflow.training.muon import orthogonal
from reelflow.training.one_pass import one_pass
from reelflow.training.vae import Trainer, export, loss_of, measure, new_vae, save
from reelflow.training.vae_batches import VaeTraining, around, batch, to_pixels

SMALL = VaeTraining(pixels=5 * 32 * 32, shapes=((1, 32), (5, 32)), last_share=0.0, steps=10, warmup=2)


def shaken_vae(decoder: int = 16) -> AutoencoderKLWan:
    """A new VAE whose norms and biases are random, so that a mistake in them shows; with a decoder so wide."""
    torch.manual_seed(1)
    vae = new_vae().eval()
    if decoder != 16:
        vae = AutoencoderKLWan.from_config({**vae.config, "decoder_base_dim": decoder}).eval()
    for parameter in vae.parameters():
        if parameter.shape[1:].numel() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return vae


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_one_pass_is_the_chunked_vae(frames: int) -> None:
    vae = shaken_vae()
    x, z = torch.rand(2, 3, frames, 64, 48) * 2 - 1, torch.randn(2, 48, 1 + frames // 4, 4, 3)
    torch.testing.assert_close(one_pass(vae).encode(x), vae.encode(x).latent_dist.parameters, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one_pass(vae).decode(z).clamp(-1, 1), vae.decode(z).sample, atol=1e-5, rtol=1e-4)


def test_one_pass_has_the_gradients_of_the_chunked_vae() -> None:
    vae, x, weight = shaken_vae(), torch.rand(2, 3, 5, 32, 16) * 2 - 1, torch.randn(2, 3, 5, 32, 16)

    def gradients(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        vae.zero_grad()
        (decode(encode(x).chunk(2, 1)[0]).clamp(-1, 1) * weight).sum().backward()
        return [parameter.grad for parameter in vae.parameters()]

    expected = gradients(lambda x: vae.encode(x).latent_dist.parameters, lambda z: vae.decode(z).sample)
    found = gradients(one_pass(vae).encode, one_pass(vae).decode)
    for (name, _), ours, theirs in zip(vae.named_parameters(), found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours - theirs).norm() < 1e-3 * theirs.norm() + 1e-5, name


@pytest.mark.parametrize("frames", [1, 5])
def test_gradients_in_bfloat16_are_those_of_float32(frames: int) -> None:
    """oneDNN's bfloat16 convolution over three axes has wrong gradients where frames are few and large."""
    vae, x = shaken_vae(decoder=32), torch.rand(6 if frames == 1 else 2, 3, frames, 128, 128) * 2 - 1
    found = []
    for low in (False, True):
        vae.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            mean = one_pass(vae).encode(x).float().chunk(2, 1)[0]
            y = one_pass(vae).decode(mean).float()
        (y - x).square().mean().backward()
        found.append([parameter.grad for parameter in vae.parameters()])
    for (name, parameter), exact, low in zip(vae.named_parameters(), *found, strict=True):
        if parameter.dim() == 5 and exact is not None and exact.norm() > 1e-4:
            assert (low - exact).norm() < 0.15 * exact.norm(), (name, float((low - exact).norm() / exact.norm()))


def test_steps_lower_the_loss_of_a_fixed_batch() -> None:
    trainer = Trainer(SMALL)
    before = copy.deepcopy(trainer.vae.state_dict())
    x, mask = batch(SMALL, 0)

    def loss() -> float:
        with torch.no_grad():
            return float(loss_of(SMALL, trainer.model, x, mask, torch.Generator().manual_seed(0))[0])

    first = loss()
    for _ in range(6):
        trainer.update()
    assert loss() < 0.9 * first
    assert all(not torch.equal(value, before[name]) for name, value in trainer.vae.state_dict().items())


def test_a_stopped_run_continues_exactly(tmp_path: Path) -> None:
    whole = Trainer(SMALL)
    for _ in range(4):
        whole.update()
    part = Trainer(SMALL)
    for _ in range(2):
        part.update()
    save(part, tmp_path / "vae.pt")
    rest = Trainer(SMALL.model_copy(update={"seed": 0}))
    rest.load(torch.load(tmp_path / "vae.pt", weights_only=True))
    for _ in range(2):
        rest.update()
    for name, value in whole.state()["average"].items():
        assert torch.equal(value, rest.state()["average"][name]), name


def test_decoder_only_leaves_the_latents() -> None:
    trainer = Trainer(SMALL.model_copy(update={"decoder_only": True, "noise": 0.1}))
    before = copy.deepcopy(trainer.vae.state_dict())
    trainer.update()
    changed = {name.split(".")[0] for name, value in trainer.vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_batches_follow_from_seed_step_and_rank() -> None:
    assert torch.equal(batch(SMALL, 3)[0], batch(SMALL, 3)[0])
    assert not torch.equal(batch(SMALL, 3)[0][:1, :, :1], batch(SMALL, 3, rank=1)[0][:1, :, :1])


def test_what_weighs_more_reaches_equally_far_in_and_out() -> None:
    """A ball's edge moved outwards costs what it costs moved inwards."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def ball(radius: float) -> Tensor:
        return ((x - 31.5).hypot(y - 31.5) < radius)[None, None]

    mask = around(ball(14))
    wrong = [((ball(14 + by) != ball(14)) & mask).sum() / ball(14 + by).logical_xor(ball(14)).sum() for by in (-4, 4)]
    assert wrong == [1, 1]
    assert not mask[0, 0, 0, 0]


def test_orthogonal_update_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 8, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.4


@torch.no_grad()
def test_export_loads_with_the_statistics_of_its_latents(tmp_path: Path) -> None:
    vae = shaken_vae()
    found = export(vae, tmp_path, seed=5, count=2, frames=5)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path).eval()
    x = to_pixels(render([sample_scene(5, index) for index in range(2)], 5))
    mean = loaded.encode(x).latent_dist.mode()
    assert mean.shape == (2, 48, 2, 8, 8)
    torch.testing.assert_close(mean, vae.encode(x).latent_dist.mode())
    torch.testing.assert_close(torch.tensor(loaded.config.latents_mean), mean.mean((0, 2, 3, 4)), atol=1e-5, rtol=1e-4)
    std = torch.tensor(found["std"])
    torch.testing.assert_close(torch.tensor(loaded.config.latents_std), std.clamp_min(0.1 * std.mean()))


@torch.no_grad()
def test_the_shipped_vae_is_faithful_to_toybox() -> None:
    folder = Path(__file__).parents[2] / "src/reelflow/weights/mini/vae"
    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    for split in ("train", "held_out"):
        found = measure(vae, seed=123, count=3, frames=17, split=split)
        assert found["psnr"] > 30, (split, found)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    trainer = Trainer(SMALL)
    before = {name: value.clone() for name, value in trainer.vae.state_dict().items()}
    trainer.parameters[-1].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: gradient is not finite"):
        trainer.update()
    assert all(torch.equal(value, before[name]) for name, value in trainer.vae.state_dict().items())

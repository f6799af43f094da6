"""The small VAE of Stable Video Diffusion: it begins by passing colours on, learns, goes on exactly, and its folder loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from reelflow.data.toybox import render, sample_scene
from reelflow.training.svd.codec import TemporalPass
from reelflow.training.svd.vae import SVD, latents_of, new_vae
from reelflow.training.vae import Trainer, export, measure, save
from reelflow.training.vae_batches import to_pixels

KIND = SVD._replace(new=lambda: new_vae((64, 64, 64), 8))
SMALL = SVD.settings.model_copy(update={"pixels": 4 * 32 * 32, "shapes": ((1, 32), (4, 32)), "last_share": 0.0, "steps": 40, "warmup": 4})


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def test_it_begins_with_mean_colours() -> None:
    """Latents of an untrained one tell frames of different colours apart, and do not see where within a place anything is."""
    torch.manual_seed(0)
    vae = new_vae()
    assert (2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels) == (16, 16)
    flat = torch.tensor([-0.9, 0.0, 0.9])[:, None, None, None, None].expand(3, 3, 1, 32, 32)
    latents = TemporalPass(vae).encode(flat).chunk(2, 1)[0].flatten(1)
    assert torch.pdist(latents).min() > 0.05
    down = vae.encoder.down_blocks[0].downsamplers[0]
    x = torch.randn(1, 64, 4, 4)
    torch.testing.assert_close(down(x), torch.nn.functional.avg_pool2d(x, 2))
    up = vae.decoder.up_blocks[1].upsamplers[0]
    x = torch.randn(1, 96, 3, 3)
    torch.testing.assert_close(up(x), torch.nn.functional.interpolate(x, scale_factor=2))


def test_steps_lower_the_loss_of_a_fixed_batch() -> None:
    trainer = Trainer(SMALL, kind=KIND)
    losses = []
    for _ in range(10):
        trainer.step = 3  # whose batch, noise and rate are the same every time
        losses.append(trainer.update()["loss"])
    assert losses[-1] < 0.9 * losses[0]


def test_a_stopped_run_continues_exactly(tmp_path: Path) -> None:
    whole, part = (Trainer(SMALL, kind=KIND) for _ in range(2))
    for _ in range(3):
        whole.update()
    part.update()
    save(part, tmp_path / "vae.pt")
    rest = Trainer(SMALL, kind=KIND)
    rest.load(torch.load(tmp_path / "vae.pt", weights_only=True))
    for _ in range(2):
        rest.update()
    assert all(torch.equal(value, rest.state()["average"][name]) for name, value in whole.state()["average"].items())


@torch.no_grad()
def test_its_folder_loads_with_latents_of_unit_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(new_vae((64, 64, 64), 8), tmp_path, seed=5, count=3, frames=2, kind=KIND)
    loaded = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path).eval()
    x = to_pixels(render([sample_scene(5, index) for index in range(3)], 2))
    latents = latents_of(loaded, x) * loaded.config.scaling_factor
    assert latents.shape == (3, 8, 2, 32, 32)
    assert float(latents.square().mean()) == pytest.approx(1, rel=0.05)
    found = measure(loaded, seed=3, count=1, frames=2, kind=KIND)
    assert 0 < found["psnr"] < 40

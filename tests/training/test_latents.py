"""The cache of latents holds what the VAE itself gives, and continues where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from reelflow.data.toybox import captions, edit_pair, render, sample_scene
from reelflow.training import latents
from reelflow.training.latents import Encoder, Shard, cache_latents, encode_shard, plan, read_shard
from reelflow.training.vae import to_pixels

FOLDER = Path(__file__).parents[2] / "src/reelflow/weights/mini/vae"


@torch.no_grad()
def test_encoder_is_the_vae_and_its_bfloat16_is_close() -> None:
    vae = AutoencoderKLWan.from_pretrained(FOLDER).eval()
    frames = render([sample_scene(3, 0), sample_scene(3, 1)], 9)
    mean, std = (torch.tensor(values).view(1, 1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    expected = (vae.encode(to_pixels(frames)).latent_dist.mode().transpose(1, 2) - mean) / std
    torch.testing.assert_close(Encoder(FOLDER, exact=True)(frames), expected, atol=1e-4, rtol=1e-4)
    assert (Encoder(FOLDER)(frames) - expected).square().mean().sqrt() < 0.02


def test_shards_carry_their_captions_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SAMPLES", 2)
    made = list(cache_latents(tmp_path, FOLDER, {17: 2}, {17: 1}, seed=4))
    assert sorted(path.name for path in made) == ["clips-017-00000.safetensors", "edits-017-00000.safetensors"]
    tensors, words = read_shard(tmp_path / "clips-017-00000.safetensors")
    assert tensors["latents"].shape == (2, 5, 48, 8, 8)
    assert words == [list(captions(sample_scene(4 + 17_000, index))) for index in range(2)]
    pairs, instructions = read_shard(tmp_path / "edits-017-00000.safetensors")
    assert instructions == [[edit_pair(4, 0)[2]]]
    assert not torch.equal(pairs["source"], pairs["target"])
    made[0].unlink()
    assert list(cache_latents(tmp_path, FOLDER, {17: 2}, {17: 1}, seed=4)) == [made[0]]


def test_a_clip_begins_with_the_latents_of_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SAMPLES", 1)
    encoder = Encoder(FOLDER, exact=True)
    long = encode_shard(encoder, Shard("edits", 9, 0), 0)[0]["source"]
    short = encoder(render([edit_pair(0, 0)[0]], 5))
    torch.testing.assert_close(long[:1, :2], short, atol=1e-5, rtol=1e-4)


def test_a_length_that_the_vae_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="10 frames"):
        plan({10: 4}, {})

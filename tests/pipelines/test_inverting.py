"""Likelihood and inversion through the product's calls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reelflow import Clip, Encoding
from reelflow.likelihood import add_noise
from reelflow.pipelines.starflow import EXACTLY, Sampling, StarFlowPipeline
from reelflow.sampling import Schedule


@pytest.mark.parametrize("frames", [1, 9, 33])
def test_shares_sum_to_the_whole(pipe: StarFlowPipeline, source: Clip, frames: int) -> None:
    """One frame, the trained length, and several windows."""
    clip = Clip(np.resize(source.frames, (frames, *source.frames.shape[1:])), source.fps)
    score = pipe.score(clip, "a red ball")
    latent_frames = 1 + (frames - 1) // 4
    assert score.map.shape == (latent_frames, 4, 4)
    assert score.dims == latent_frames * 16 * 8
    assert sum(score.per_frame) == pytest.approx(score.log_prob, rel=1e-5)
    assert score.map.sum((1, 2)) == pytest.approx(score.per_frame, rel=1e-5)
    assert score.bits_per_dim == pytest.approx(-score.log_prob / (score.dims * math.log(2)), rel=1e-5)


def test_score_is_the_density_of_the_noise_it_maps_to(pipe: StarFlowPipeline, source: Clip) -> None:
    """From the encoding alone: log p = Σ log N(z) + log|det|, the log-determinant by autograd in float64."""
    frame = source[:1]
    z = pipe.encode(frame, "a red ball", seed=4).z.double()
    flow = pipe.flow.double()
    try:
        x = add_noise(pipe._latents(frame), pipe.flow.config.noise_std, torch.Generator().manual_seed(4)).double()
        states = pipe.prompting.states(["a red ball"], "1:1", image=True)
        assert states is not None
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, states.double()).z, x).reshape(x.numel(), x.numel())
    finally:
        pipe.flow.float()
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() + torch.linalg.slogdet(jacobian).logabsdet
    assert pipe.score(frame, "a red ball", seed=4).log_prob == pytest.approx(float(expected), rel=1e-4)


def test_score_depends_on_clip_prompt_and_noise(pipe: StarFlowPipeline, source: Clip) -> None:
    score = pipe.score(source, "a red ball").log_prob
    assert pipe.score(source, "a red ball").log_prob == score
    assert pipe.score(source, "make the box blue").log_prob != pytest.approx(score, abs=1e-3)
    assert pipe.score(source, "a red ball", seed=1).log_prob != pytest.approx(score, abs=1e-3)
    assert pipe.score(Clip(255 - source.frames, source.fps), "a red ball").log_prob != pytest.approx(score, abs=1e-3)


def test_beyond_the_window_the_first_window_scores_the_same(pipe: StarFlowPipeline, source: Clip) -> None:
    long = Clip(np.concatenate([source.frames, source.frames[:8]]), source.fps)
    assert pipe.score(long, "x").per_frame[:3] == pytest.approx(pipe.score(source, "x").per_frame, rel=1e-4)


def test_the_heat_map_stands_beside_the_frames(pipe: StarFlowPipeline, source: Clip) -> None:
    score = pipe.score(source, "a red ball")
    seen = score.heat_map()
    assert seen.frames.shape == (9, 64, 128, 3)
    assert np.array_equal(seen.frames[:, :, :64], source.frames)
    json.dumps(score.to_dict(), allow_nan=False)


def test_the_heat_map_is_bright_where_it_is_improbable(pipe: StarFlowPipeline, source: Clip) -> None:
    black = Clip(np.zeros_like(source.frames), source.fps)
    score = pipe.score(black, "x")
    worst = np.zeros_like(score.map)
    worst[2, 0, 3] = -1000
    heat = replace(score, map=worst).heat_map().frames[:, :, 64:].astype(int).sum(3)
    frame, row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert frame >= 5, "latent frame 2 shows frames 5 to 8"
    assert row < 16, "its first row"
    assert column >= 48, "its last column"


def test_encode_and_decode_are_inverse(pipe: StarFlowPipeline, source: Clip, tmp_path: Path) -> None:
    encoding = pipe.encode(source, "a red ball", seed=5)
    encoding.save(tmp_path / "z.safetensors")
    again = Encoding.open(tmp_path / "z.safetensors")
    assert torch.equal(again.z, encoding.z)
    assert replace(again, z=encoding.z) == encoding
    original = pipe._latents(source)
    plain = replace(EXACTLY, guidance=0.0, denoise=False)
    found, _ = pipe._sample(["a red ball"], again.z[None], None, plain, lambda phase, share: None)
    assert (add_noise(found, -0.3, torch.Generator().manual_seed(5)) - original).abs().max() < 1e-4
    decoded = pipe.decode(again)
    assert np.abs(decoded.frames.astype(int) - pipe.codec.decode(original)[0].numpy()).max() <= 1
    assert (decoded.fps, decoded.metadata["prompt"], decoded.metadata["seed"]) == (8, "a red ball", 5)


def test_an_encoding_without_its_noise_is_denoised(pipe: StarFlowPipeline, source: Clip) -> None:
    encoding = replace(pipe.encode(source, "a red ball", seed=5), seed=None)
    assert len(pipe.decode(encoding)) == 9
    assert pipe.decode(encoding).metadata["settings"]["denoise"] is True


def test_generated_noise_comes_back_from_the_latents(pipe: StarFlowPipeline) -> None:
    noise = pipe._noise(1, (3, 4, 4))[None]
    states = pipe.prompting.states(["a red ball"], "1:1", image=False)
    x, _ = pipe._sample(
        ["a red ball"], noise, None, Sampling(guidance=0.0, denoise=False, schedule=Schedule("sequential")), lambda phase, share: None
    )
    with torch.no_grad():
        assert (pipe.flow(x, states).z - noise).abs().max() < 1e-3


def test_encodings_of_another_model_and_files_of_others(pipe: StarFlowPipeline, source: Clip, tmp_path: Path) -> None:
    encoding = pipe.encode(source[:1], seed=5)
    with pytest.raises(ValueError, match="encoded with tiny revision 2, this is tiny revision 1"):
        pipe.decode(replace(encoding, revision="2"))
    with pytest.raises(ValueError, match="expected finite"):
        pipe.decode(replace(encoding, z=encoding.z * torch.nan))
    for name, tensors, about in (
        ("weights", {"w": torch.zeros(3)}, None),
        ("nothing said", {"z": torch.zeros(1, 8, 4, 4)}, None),
        ("other words", {"z": torch.zeros(1, 8, 4, 4)}, {"reelflow": "hello"}),
        ("part of it", {"z": torch.zeros(1, 8, 4, 4)}, {"reelflow": '{"prompt": "x"}'}),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, about)
        with pytest.raises(ValueError, match="not an encoding; make one with: reelflow encode"):
            Encoding.open(path)

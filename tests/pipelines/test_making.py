"""Clips from text, pictures and video: what a seed, a sampler, a batch, a length change, and what they may not."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reelflow
from reelflow import Clip
from reelflow.pipelines.base import picture
from reelflow.pipelines.loading import Asked
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline
from reelflow.sampling import Schedule

EXACT = Sampling(schedule=Schedule("sequential"))
QUICK = Sampling(guidance=0.0)


def difference(a: Clip, b: Clip) -> int:
    """Largest difference in levels of 255."""
    assert a.frames.shape == b.frames.shape
    return int(np.abs(a.frames.astype(int) - b.frames).max())


def latents(pipe: StarFlowPipeline, schedule: Schedule, seed: int = 1) -> torch.Tensor:
    noise = pipe._noise(seed, (3, 4, 4))[None]
    return pipe._sample(["a red ball"], noise, None, Sampling(schedule=schedule), lambda phase, share: None)[0]


def test_a_seed_is_a_clip(pipe: StarFlowPipeline, source: Clip) -> None:
    again, other = pipe.generate("a red ball", seed=1), pipe.generate("a red ball", seed=2)
    assert np.array_equal(again.frames, source.frames)
    assert difference(again, other) > 30
    assert source.frames.std() > 5, "a flat clip would make every test here pass"


def test_without_a_seed_one_is_drawn_and_stored(pipe: StarFlowPipeline) -> None:
    first, second = (pipe.generate("x", frames=1, sampling=QUICK) for _ in range(2))
    assert first.metadata["seed"] != second.metadata["seed"]
    assert np.array_equal(pipe.generate("x", frames=1, seed=first.metadata["seed"], sampling=QUICK).frames, first.frames)


def test_prompt_and_guidance_matter(pipe: StarFlowPipeline, source: Clip) -> None:
    assert difference(pipe.generate("make the box blue", seed=1), source) > 5
    assert difference(pipe.generate("a red ball", seed=1, sampling=Sampling(guidance=4.0)), source) > 5


def test_temperature_is_the_deviation_of_the_noise(pipe: StarFlowPipeline) -> None:
    """1 is what a model without one does; at 0 every seed is one clip; the model's own stands for none."""

    def made(pipe: StarFlowPipeline, seed: int, temperature: float | None) -> np.ndarray:
        clip = pipe.generate("a red ball", seed=seed, sampling=Sampling(temperature=temperature))
        assert clip.metadata["settings"]["temperature"] == (pipe.about.temperature if temperature is None else temperature)
        return clip.frames

    assert np.array_equal(made(pipe, 1, 1.0), made(pipe, 1, None))
    assert not np.array_equal(made(pipe, 1, 0.5), made(pipe, 1, 1.0))
    assert np.array_equal(made(pipe, 1, 0.0), made(pipe, 2, 0.0))
    cooler = copy(pipe)
    cooler.about = pipe.about.model_copy(update={"temperature": 0.5})
    assert np.array_equal(made(cooler, 1, None), made(pipe, 1, 0.5))
    streamed = np.concatenate([piece.frames for piece in cooler.stream("a red ball", seed=1)])
    assert np.abs(streamed.astype(int) - made(pipe, 1, 0.5)).max() <= 1


def test_every_sampler_gives_the_same_latents(pipe: StarFlowPipeline) -> None:
    exact = latents(pipe, Schedule("sequential"))
    assert (latents(pipe, Schedule(tolerance=0)) - exact).abs().max() < 1e-4
    error = latents(pipe, Schedule()) - exact
    assert error.square().mean().sqrt() / exact.square().mean().sqrt() < 1e-3


def test_every_sampler_gives_the_same_clip(pipe: StarFlowPipeline, source: Clip) -> None:
    assert difference(pipe.generate("a red ball", seed=1, sampling=EXACT), source) <= 1


def test_a_clip_does_not_depend_on_its_batch(pipe: StarFlowPipeline) -> None:
    alone = pipe.generate("a red ball", seed=1, sampling=EXACT)
    batch = pipe.generate_batch(["make the box blue", "a red ball"], [5, 1], sampling=EXACT)
    assert difference(batch[1], alone) <= 1
    assert (batch[1].metadata["prompt"], batch[1].metadata["seed"]) == ("a red ball", 1)
    assert difference(batch[0], alone) > 5


def test_a_longer_clip_begins_with_the_same_noise(pipe: StarFlowPipeline) -> None:
    short, long = pipe._noise(3, (2, 4, 4)), pipe._noise(3, (5, 4, 4))
    assert torch.equal(long[:2], short)
    plain = Sampling(guidance=0.0, denoise=False)
    assert difference(pipe.generate("x", seed=3, frames=9, sampling=plain)[:5], pipe.generate("x", seed=3, frames=5, sampling=plain)) <= 1


def test_lengths(pipe: StarFlowPipeline) -> None:
    assert len(pipe.generate("x", seconds=0.01, sampling=QUICK)) == 1
    assert len(pipe.generate("x", seconds=2, sampling=QUICK)) == 17, "16 frames are nearest to 17, beyond the window"
    with pytest.raises(ValueError, match=r"frames = 10: must be 1 \+ 4k .* nearest: 9 or 13"):
        pipe.generate("x", frames=10)


def test_stream_pieces_are_the_clip(pipe: StarFlowPipeline, source: Clip) -> None:
    """To rounding: frame by frame, sums are taken in another order."""
    pieces = list(pipe.stream("a red ball", seed=1))
    assert [len(piece) for piece in pieces] == [1, 4, 4]
    streamed = np.concatenate([piece.frames for piece in pieces])
    assert difference(Clip(streamed, source.fps), source) <= 1
    assert (streamed != source.frames).mean() < 0.01
    assert 0 < pieces[0].metadata["seconds"]["first_frame"] == pieces[-1].metadata["seconds"]["first_frame"]


def test_a_stream_takes_other_prompts_on_the_way(pipe: StarFlowPipeline) -> None:
    """Up to their time nothing changes, and the metadata says them all."""
    plain, changed = (
        list(pipe.stream(prompts=prompts, seed=1, sampling=Sampling(guidance=4.0)))
        for prompts in ([(0, "a red ball")], [(0, "a red ball"), (0.3, "make the box blue")])
    )
    assert difference(changed[0], plain[0]) <= 1
    assert difference(changed[1], plain[1]) <= 1, "0.3 s lie in the second latent frame; the third is the first after"
    assert difference(changed[2], plain[2]) > 1
    assert changed[0].metadata["prompt"] == "a red ball → make the box blue"


@pytest.mark.parametrize("prompts", [[], [(1, "x")], [(0, "x"), (2, "y"), (1, "z")], [(0, "x"), (0, "y")], [(0, "x"), (1, " ")]])
def test_prompts_of_a_stream_that_are_not_usable(pipe: StarFlowPipeline, prompts: list[tuple[float, str]]) -> None:
    with pytest.raises(ValueError, match=r"the first has to be at 0|the prompt ' ' is empty"):
        next(pipe.stream(prompts=prompts, seed=1))


def test_a_certificate_is_in_the_metadata(pipe: StarFlowPipeline) -> None:
    found = pipe.generate("a red ball", seed=1, frames=5, sampling=Sampling(certify=True)).metadata["certificate"]
    assert 0 < found["rms"] < found["largest"] < 0.05
    rough = pipe.generate("a red ball", seed=1, frames=5, sampling=Sampling(certify=True, schedule=Schedule(tolerance=0.05)))
    assert rough.metadata["certificate"]["largest"] > found["largest"]


def test_progress_reaches_the_end_of_every_phase(pipe: StarFlowPipeline, source: Clip) -> None:
    for task in (
        lambda report: pipe.generate("x", seed=0, progress=report),
        lambda report: pipe.extend(source, "x", seconds=3, seed=0, progress=report),
    ):
        said: dict[str, list[float]] = {}
        task(lambda phase, share: said.setdefault(phase, []).append(share))  # noqa: B023
        assert list(said) == ["sampling", "denoising", "decoding"]
        assert said["sampling"] == sorted(said["sampling"])
        assert said["sampling"][-1] == pytest.approx(1), "the bar would stop short"
        assert said["sampling"][-2] < 1
        assert said["decoding"][-1] == 1


# -------------------------------------------------------------------------------------------------------- pictures


def reconstruction(pipe: StarFlowPipeline, frames: np.ndarray) -> np.ndarray:
    """What the video codec makes of one frame (H, W, 3) of the model's size."""
    return pipe.codec.decode(pipe.codec.encode(torch.from_numpy(frames.copy())[None, None]))[0, 0].numpy()


def animated(pipe: StarFlowPipeline, shown: object) -> np.ndarray:
    """The first frame of a short clip from a picture."""
    clip = pipe.animate(shown, "x", seed=0, frames=5, sampling=QUICK)  # type: ignore[arg-type]
    assert clip.frames.shape == (5, 64, 64, 3)
    return clip.frames[0]


def test_animate_begins_with_the_picture(pipe: StarFlowPipeline, source: Clip) -> None:
    shown = source.frames[4].copy()
    clip = pipe.animate(Image.fromarray(shown), "x", seed=0)
    assert len(clip) == 9
    assert np.array_equal(clip.frames[0], reconstruction(pipe, shown))
    assert np.abs(clip.frames[1:].astype(int) - clip.frames[:1]).mean() > 1


@pytest.fixture
def photo() -> Image.Image:
    """90 × 70, smooth and of many colours."""
    y, x = np.mgrid[0:70, 0:90]
    return Image.fromarray(np.stack([x * 2, y * 3, (x + y)], 2).astype(np.uint8))


def with_alpha(photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    clear = photo.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    white = Image.new("RGBA", photo.size, "white")
    return clear, Image.alpha_composite(white, clear).convert("RGB")


def with_palette(photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    indexed = photo.quantize(64)
    return indexed, indexed.convert("RGB")


def with_16_bits(photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    grey = np.asarray(photo.convert("L"))
    return Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey).convert("RGB")


def turned(photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    lying = photo.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[274] = 6  # shown turned by 90° clockwise
    return lying, photo


@pytest.mark.parametrize("kind", [with_alpha, with_palette, with_16_bits, turned])
def test_a_picture_of_any_mode_is_its_plain_form(
    pipe: StarFlowPipeline, photo: Image.Image, kind: Callable[[Image.Image], tuple[Image.Image, Image.Image]], tmp_path: Path
) -> None:
    special, plain = kind(photo)
    file = tmp_path / "photo.png"
    special.save(file, exif=special.getexif())
    for given in (special, file, Clip(np.asarray(plain)[None].repeat(2, 0), 5)):
        assert np.array_equal(picture(given).frames, np.asarray(plain)[None])
    assert np.array_equal(animated(pipe, file), animated(pipe, np.asarray(plain)))


@pytest.mark.parametrize("size", [(16, 16), (17, 300), (801, 33)])
def test_a_picture_of_any_size_is_cropped_in_the_middle(pipe: StarFlowPipeline, size: tuple[int, int]) -> None:
    """A red square fills the middle of a white picture: it fills the frame, but for the filter's reach at its edges."""
    width, height = size
    pixels = np.full((height, width, 3), 255, np.uint8)
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = (200, 30, 40)
    fitted, aspect = pipe.framing.fit(picture(pixels))
    assert (fitted.frames.shape, aspect) == ((1, 64, 64, 3), "1:1")
    reach = 14
    assert (fitted.frames[:, reach:-reach, reach:-reach] == (200, 30, 40)).all()
    animated(pipe, pixels)


def test_a_picture_too_small_to_show_anything(pipe: StarFlowPipeline) -> None:
    with pytest.raises(ValueError, match="1 × 40 pixels; give one of at least 16 × 16"):
        pipe.animate(np.zeros((40, 1, 3), np.uint8))


# ---------------------------------------------------------------------------------------------------------- videos


def moving(frames: int, fps: float, height: int = 64, width: int = 64) -> Clip:
    """Brightness tells the time: second t has level 20 t."""
    level = (np.arange(frames) / fps * 20).round().astype(np.uint8)
    return Clip(np.broadcast_to(level[:, None, None, None], (frames, height, width, 3)).copy(), fps)


@pytest.mark.parametrize("fps", [179 / 6, 12.5, 10.0, 8.0, 3.0])
def test_videos_of_any_rate_come_at_the_models(pipe: StarFlowPipeline, fps: float) -> None:
    source, _ = pipe.framing.source(moving(int(3 * fps), fps, 90, 160), None)
    assert source.frames.shape == (21, 64, 64, 3), "24 frames of 8 per second, cut to 1 + 4k"
    expected = np.arange(21) / 8 * 20
    assert np.abs(source.frames[:, 0, 0, 0] - expected).max() <= 20 / fps + 1


def test_extend_keeps_the_source_and_has_the_length(pipe: StarFlowPipeline, source: Clip) -> None:
    clip = pipe.extend(source, "x", seconds=5, seed=2, sampling=QUICK)
    assert len(clip) == 41, "40 frames asked for, in groups of four after the source's 9; five windows"
    assert np.array_equal(clip.frames[:9], source.frames)
    assert np.abs(np.diff(clip.frames[9:].astype(int), axis=0)).mean(axis=(1, 2, 3)).min() > 0.1, "it stands still"
    assert clip.metadata["settings"]["source_frames"] == 9


@pytest.mark.parametrize("frames", [1, 3, 21])
def test_extend_takes_a_source_of_any_length(pipe: StarFlowPipeline, frames: int) -> None:
    clip = pipe.extend(moving(frames, 8), "", seconds=4, seed=2, sampling=QUICK)
    assert len(clip) in range(32, 36)
    assert np.array_equal(clip.frames[: 1 + (frames - 1) // 4 * 4], moving(frames, 8).frames[: 1 + (frames - 1) // 4 * 4])


def test_extend_reads_its_source(pipe: StarFlowPipeline, source: Clip) -> None:
    other = Clip(255 - source.frames, source.fps)
    first, second = (pipe.extend(clip, "x", seconds=2, seed=2, sampling=QUICK).frames[9:] for clip in (source, other))
    assert np.abs(first.astype(int) - second).max() > 5


def test_edit_has_the_sources_length_and_reads_it(pipe: StarFlowPipeline, source: Clip) -> None:
    clip = pipe.edit(source, "make the box blue", seed=2)
    assert clip.frames.shape == source.frames.shape
    assert difference(clip, pipe.edit(Clip(255 - source.frames, source.fps), "make the box blue", seed=2)) > 5
    assert len(pipe.edit(source[:6], "make it blue", seed=2, sampling=QUICK)) == 5
    with pytest.warns(UserWarning, match="has 14 frames at 8 per second; the first 9 are used"):
        assert len(pipe.edit(moving(14, 8), "make it blue", seed=2, sampling=QUICK)) == 9


def test_whole_edits_read_a_short_video_as_if_its_last_frame_stayed(pipe: StarFlowPipeline, source: Clip) -> None:
    """And make as much of it as there was: the beginning of what they make of the video held to the trained length."""
    about = pipe.about.model_copy(update={"whole_edits": True})
    whole = StarFlowPipeline(about, pipe.flow, pipe.codec, pipe.text)
    short, plain = source[:5], replace(EXACT, denoise=False)  # the denoiser looks a frame ahead
    held = short + Clip(source.frames[[4] * 4], source.fps)
    made = whole.edit(short, "make it blue", seed=2, sampling=plain)
    assert len(made) == made.metadata["settings"]["frames"] == 5
    assert difference(made, whole.edit(held, "make it blue", seed=2, sampling=plain)[:5]) <= 1
    assert difference(made, pipe.edit(short, "make it blue", seed=2, sampling=plain)) > 5
    assert difference(whole.edit(source, "make it blue", seed=2), pipe.edit(source, "make it blue", seed=2)) == 0
    sizes = [Asked(frames=frames, task="edit").wish(about, pipe.flow.config, pipe.codec) for frames in (5, 9)]
    assert sizes[0] == sizes[1] != Asked(frames=5, task="edit").wish(pipe.about, pipe.flow.config, pipe.codec)


def test_a_task_the_model_was_not_trained_for(tiny_model: Path, pipe: StarFlowPipeline, source: Clip) -> None:
    about = pipe.about.model_copy(update={"tasks": ("generate",)})
    limited = StarFlowPipeline(about, pipe.flow, pipe.codec, pipe.text)
    with pytest.raises(ValueError, match=r"tiny was not trained to edit \(it can: generate\); use another model"):
        limited.edit(source, "make it blue")


def test_how_it_was_made_survives_the_file(source: Clip, tmp_path: Path) -> None:
    for name in ("clip.mp4", "clip.webm", "clip.gif", "clip"):
        source.save(tmp_path / name)
        assert Clip.open(tmp_path / name).metadata == source.metadata
    made = source.metadata
    assert made["ai_generated"] is True
    assert (made["model"], made["revision"], made["prompt"], made["seed"]) == ("tiny", "1", "a red ball", 1)
    assert made["version"] == reelflow.__version__
    assert {"guidance", "sampler", "tolerance", "frames"} <= made["settings"].keys()
    source.save(tmp_path / "plain.mp4", metadata=False)
    assert Clip.open(tmp_path / "plain.mp4").metadata == {}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_guidance_that_is_no_weight(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"guidance {wrong} is not usable"):
        Sampling(guidance=wrong)


@pytest.mark.parametrize("wrong", [float("nan"), 1.5, -1.0])
def test_temperature_that_is_none(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"temperature {wrong} is not usable; give a number from 0 to 1"):
        Sampling(temperature=wrong)


def test_long_prompts_are_cut_and_said(pipe: StarFlowPipeline) -> None:
    with pytest.warns(UserWarning, match="longer than the 48 tokens the text encoder takes; not read: .*zebra"):
        pipe.generate("x" * 100 + " zebra", frames=1, sampling=QUICK)


def test_devices_that_are_not_there(tiny_model: Path) -> None:
    for device in ("quantum", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            reelflow.load(tiny_model, device)

"""Stable Video Diffusion through the product's calls: diffusers' frames, none of its bugs, and what settings may change."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reelflow import Clip
from reelflow.pipelines.base import silent
from reelflow.pipelines.svd import Diffusion, SvdPipeline, blocks
from reelflow.pipelines.svd.blocks import Activation
from reelflow.pipelines.svd.memory import activation_bytes, what_fits
from reelflow.pipelines.svd.picture import clip_view, open_picture, pixels
from reelflow.pipelines.svd.settings import euler
from reelflow.sampling.replay import Replay

tiny = runpy.run_path(str(Path(__file__).with_name("svd_tiny.py")))
QUICK = Diffusion(steps=2)
THEIRS = Diffusion(steps=3, reference="diffusers")


@pytest.fixture(scope="module")
def parts():
    return tiny["tiny_parts"]()


@pytest.fixture(scope="module")
def svd(parts) -> SvdPipeline:
    return SvdPipeline(parts)


@pytest.fixture(scope="module")
def theirs(parts):
    """After ours is built: both share the modules."""
    return tiny["theirs"](parts)


def noise_picture(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def sampled(svd: SvdPipeline, picture: Image.Image, seed: int, sampling: Diffusion, frames: int = 4) -> Tensor:
    """(F, 3, H, W), 0 … 1, not through 8 bits."""
    shown = pixels(open_picture(picture), picture.height, picture.width)
    made, _ = svd._sample(shown[None], [seed], frames, svd._settled(sampling), silent)
    return (made[0] / 2 + 0.5).clamp(0, 1)


def difference(a: Clip, b: Clip) -> int:
    assert a.frames.shape == b.frames.shape
    return int(np.abs(a.frames.astype(int) - b.frames).max())


@pytest.mark.parametrize(
    ("changed", "asked"),
    [
        ({}, {}),
        ({"fps": 15, "motion": 40, "noise_aug": 0.3}, {"fps": 15, "motion_bucket_id": 40, "noise_aug_strength": 0.3}),
        ({"guidance": 1.0}, {"max_guidance_scale": 1.0}),
        ({"guidance": 4.0, "first_guidance": 2.0}, {"max_guidance_scale": 4.0, "min_guidance_scale": 2.0}),
    ],
)
def test_frames_are_those_of_diffusers(svd: SvdPipeline, theirs, changed: dict, asked: dict) -> None:
    picture = noise_picture(64, 128)
    ours = sampled(svd, picture, 7, replace(THEIRS, **changed))
    wanted = theirs(
        picture,
        height=64,
        width=128,
        num_frames=4,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **asked,
    ).frames[0]
    assert wanted.std() > 0.05
    assert (ours - wanted).abs().max() < 1e-4


def test_the_two_references_differ(svd: SvdPipeline) -> None:
    """By the epsilon of norms: a little, and more than rounding."""
    picture = noise_picture()
    gap = (sampled(svd, picture, 7, THEIRS) - sampled(svd, picture, 7, replace(THEIRS, reference="stability"))).abs().max()
    assert 2e-5 < gap < 1e-2


def test_a_batch_is_its_clips(svd: SvdPipeline) -> None:
    """diffusers pairs the embedding of one picture with the latents of another."""
    pictures, seeds = [noise_picture(seed=1), noise_picture(seed=2)], [3, 4]
    together = svd.animate_batch(pictures, seeds, sampling=QUICK)
    for picture, seed, clip in zip(pictures, seeds, together, strict=True):
        assert difference(clip, svd.animate(picture, seed=seed, sampling=QUICK)) <= 1
    assert difference(*together) > 20


def test_guidance_may_fall_over_the_frames(svd: SvdPipeline) -> None:
    """diffusers stops with a size mismatch. After one step every frame is where its own weight puts it."""
    noise, picture, states = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(1, tiny["STATES"])

    def latents(first: float, last: float) -> Tensor:
        sampling = svd._settled(Diffusion(steps=1, first_guidance=first, guidance=last))
        with torch.no_grad():
            return svd._denoise(noise, picture, states, sampling, silent)[0]

    falling = latents(2.5, 1.0)
    for frame, weight in enumerate((2.5, 2.0, 1.5, 1.0)):
        assert torch.allclose(falling[frame], latents(weight, weight)[frame], atol=1e-3, rtol=1e-5)
    assert (falling[0] - latents(1.0, 1.0)[0]).abs().max() > 0.01
    assert len(svd.animate(noise_picture(), seed=1, sampling=replace(QUICK, first_guidance=2.5, guidance=0.5))) == 4


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a value, or hands one over as a tensor, which a GPU would have to be waited for."""

    waits = tuple(getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh"))
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.waits
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("piece", [20_000, 2**40], ids=["pieces", "whole"])
def test_no_step_is_waited_for(piece: int, svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_PIECE", piece)
    noise, picture, states = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(1, tiny["STATES"])
    counts = []
    for steps in (2, 6):
        with torch.no_grad(), Reads() as reads:
            svd._denoise(noise, picture, states, svd._settled(Diffusion(steps=steps)), silent)
        counts.append(reads.count)
    assert counts[0] == counts[1]
    with Reads() as reads:
        bool(torch.ones(1).new_tensor([2.0]) > 0)
    assert reads.count == 2, "or this test proves nothing"


def test_a_step_is_recorded_once_and_replayed(svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, here: steps of a key are the first of them again and again, whatever the host would do later."""
    sigmas = [step.sigma for step in euler(svd.scheduler, 5)[1]]
    between = (sigmas[3], sigmas[1])
    asked = [({}, 1), ({"guidance": 1.0}, 1), ({"guided": between}, 2), ({"reuse": 2}, 0)]
    hows = [Diffusion(steps=5, **given) for given, _ in asked]
    wanted = [sampled(svd, noise_picture(), 1, how) for how in hows]
    recorded = dict[Any, Any]()
    monkeypatch.setattr(Replay, "__call__", lambda self, key, run: recorded.setdefault(key, run)())
    assert torch.equal(sampled(svd, noise_picture(), 1, hows[0]), wanted[0])
    assert not recorded, "only if asked to"
    monkeypatch.setattr(svd.denoiser, "recorded", True)
    for how, frames, (_, keys) in zip(hows, wanted, asked, strict=True):
        recorded.clear()
        assert torch.equal(sampled(svd, noise_picture(), 1, how), frames)
        assert len(recorded) == keys


@pytest.mark.gpu
def test_compiled_and_replayed_steps_are_the_steps(device: str) -> None:
    parts = tiny["tiny_parts"]()
    for module in (parts.unet, parts.vae, parts.image_encoder):
        module.to(device)
    pipe = SvdPipeline(parts)
    wanted = sampled(pipe, noise_picture(), 1, Diffusion(steps=5))
    pipe.compile()
    for _ in range(2):
        assert (sampled(pipe, noise_picture(), 1, Diffusion(steps=5)) - wanted).abs().max() < 1e-4


def test_compiled_regions_give_the_same_frames(parts, svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, but not made into kernels, which takes minutes."""
    compiled, compile_ = set[str](), nn.Module.compile

    def traced(module: nn.Module, **how: Any) -> None:
        compiled.add(type(module).__name__)
        compile_(module, backend="aot_eager", fullgraph=True, **how)

    monkeypatch.setattr(nn.Module, "compile", traced)
    pipe = SvdPipeline(parts)
    pipe.compile()
    assert compiled == {"Activation", "FeedForward", "SelfAttention"}
    assert pipe.denoiser.recorded
    made = sampled(pipe, noise_picture(), 1, QUICK)
    assert (made - sampled(svd, noise_picture(), 1, QUICK)).abs().max() < 1e-5


def test_a_compiled_region_gives_the_same_values() -> None:
    """As a kernel: the one that is most of a norm's work."""
    region, x = Activation(nn.GroupNorm(32, 64)), torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = region(x)
        region.compile(dynamic=False)
        assert (region(x) - wanted).abs().max() < 1e-5


def test_one_frame(svd: SvdPipeline) -> None:
    """diffusers stops with a size mismatch."""
    assert svd.animate(noise_picture(), seed=1, frames=1, sampling=QUICK).frames.shape == (1, 64, 64, 3)
    assert svd.animate(noise_picture(), seed=1, frames=1, sampling=replace(QUICK, first_guidance=2.0)).frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode(svd: SvdPipeline, mode: str) -> None:
    """diffusers raises for those with transparency and for grey ones."""
    picture = Image.fromarray(np.full((64, 64), 40_000, np.uint16)) if mode == "I;16" else noise_picture().convert(mode)
    assert svd.animate(picture, seed=1, frames=1, sampling=Diffusion(steps=1)).frames.shape == (1, 64, 64, 3)


def test_pictures_are_turned_upright_and_cut_never_squashed() -> None:
    middle = np.zeros((64, 192, 3), np.uint8)
    middle[:, 64:128] = 255
    assert (pixels(open_picture(middle), 64, 64) == 1).all(), "the middle, whole"
    sideways = Image.fromarray(middle)
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.info["exif"] = exif.tobytes()
    opened = open_picture(sideways)
    assert isinstance(opened, Clip)
    assert (opened.height, opened.width) == (192, 64)


def test_floating_point_pictures_do_not_go_through_8_bits() -> None:
    frame = np.full((64, 64, 3), 0.50071, np.float32)
    assert pixels(open_picture(frame), 64, 64)[0, 0, 0] == pytest.approx(2 * 0.50071 - 1, abs=1e-6)
    wide = np.zeros((32, 96, 3))
    wide[:, 32:64] = 1.0
    assert (pixels(open_picture(wide), 64, 64)[:, :, 8:-8] - 1).abs().max() < 1e-3, "cut and enlarged"
    for bad in (np.full((64, 64, 3), np.nan), np.full((64, 64, 3), 2.0), np.zeros((64, 64))):
        with pytest.raises(ValueError, match="give finite values 0 … 1"):
            open_picture(bad)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (224, 224), (300, 1000)])
def test_clip_sees_what_diffusers_shows_it(height: int, width: int) -> None:
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    x = torch.rand(2, 3, height, width) * 2 - 1
    wanted = (_resize_with_antialiasing(x, (224, 224)) + 1) / 2
    assert (clip_view(x, (0.0,) * 3, (1.0,) * 3) - wanted).abs().max() < 1e-5


def test_steps_are_eulers(parts) -> None:
    """Against the scheduler's own, step by step, on one clip of noise and arbitrary answers."""
    times, steps, spread = euler(parts.scheduler, 7)
    theirs = type(parts.scheduler).from_config(parts.scheduler.config)
    theirs.set_timesteps(7)
    x = torch.randn(1, 2, 4, 8, 8) * spread
    wanted = x.clone()
    assert spread == pytest.approx(700.0007, abs=1e-3)
    for index, step in enumerate(steps):
        v = torch.randn(x.shape)
        assert torch.allclose(x * step.scale, theirs.scale_model_input(wanted, theirs.timesteps[index]), atol=1e-5)
        assert times[index] == theirs.timesteps[index]
        x = step.keep * x + step.move * v
        wanted = theirs.step(v, theirs.timesteps[index], wanted).prev_sample
        assert (x - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_levels_of_align_your_steps(parts) -> None:
    """As published for ten steps; of nineteen every second is one of those. They begin and end where the model's own do."""
    published = [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034]
    times, steps, spread = euler(parts.scheduler, 10, "ays")
    assert [step.sigma for step in steps] == pytest.approx(published)
    assert times.tolist() == pytest.approx([np.log(sigma) / 4 for sigma in published])
    assert [step.sigma for step in euler(parts.scheduler, 19, "ays")[1]][::2] == pytest.approx(published)
    own, levels, wide = euler(parts.scheduler, 10)
    assert (levels[0].sigma, wide, float(own[0])) == pytest.approx((steps[0].sigma, spread, float(times[0])), rel=1e-5)
    last = steps[-1]
    assert (last.keep, last.move) == pytest.approx((last.scale**2, -last.sigma * last.scale)), "ends at D, without noise"


class Calls:
    """Rows of the outermost and how often the inner levels of the UNet are computed."""

    def __init__(self, svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch):
        self.rows, self.inner, network = list[int](), 0, svd.denoiser
        forward, inner = network.forward, network._inner

        def outer(x, conditions, *rest):
            self.rows.append(len(conditions.picture))
            return forward(x, conditions, *rest)

        def below(*given):
            self.inner += 1
            return inner(*given)

        monkeypatch.setattr(network, "forward", outer)
        monkeypatch.setattr(network, "_inner", below)


def test_inner_levels_are_computed_in_some_steps_only(svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled(svd, noise_picture(), 1, Diffusion(steps=5))
    calls = Calls(svd, monkeypatch)
    assert torch.equal(sampled(svd, noise_picture(), 1, Diffusion(steps=5, reuse=1)), whole)
    assert (calls.inner, len(calls.rows)) == (5, 5)
    less = sampled(svd, noise_picture(), 1, Diffusion(steps=5, reuse=2))
    assert (calls.inner, len(calls.rows)) == (5 + 3, 10)
    assert 1e-4 < (less - whole).abs().max() < 0.5


def test_guidance_at_some_noise_levels_only(svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**how) -> Tensor:
        return sampled(svd, noise_picture(), 1, Diffusion(steps=5, first_guidance=3.0, guidance=3.0, **how))

    whole, none = made(), sampled(svd, noise_picture(), 1, Diffusion(steps=5, guidance=1.0))
    calls = Calls(svd, monkeypatch)
    assert torch.equal(made(guided=(0.0, 1000.0)), whole)
    assert (made(guided=(800.0, 1000.0)) - none).abs().max() < 1e-5
    sigmas = [step.sigma for step in euler(svd.scheduler, 5)[1]]
    calls.rows.clear()
    part = made(guided=(sigmas[3], sigmas[1]))
    assert calls.rows == [1, 2, 2, 2, 1]
    assert min((part - whole).abs().max(), (part - none).abs().max()) > 1e-4


def test_rows_of_guidance_that_were_not_computed_are_not_reused(svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = [step.sigma for step in euler(svd.scheduler, 4)[1]]
    calls = Calls(svd, monkeypatch)
    sampled(svd, noise_picture(), 1, Diffusion(steps=4, guidance=3.0, guided=(sigmas[2], sigmas[1]), reuse=4))
    assert (calls.rows, calls.inner) == ([1, 2, 2, 1], 2)


def test_a_seed_is_a_clip(svd: SvdPipeline) -> None:
    one, again, other = (svd.animate(noise_picture(), seed=seed, sampling=QUICK) for seed in (1, 1, 2))
    assert np.array_equal(one.frames, again.frames)
    assert difference(one, other) > 20
    assert one.frames.std() > 5
    drawn = svd.animate(noise_picture(), frames=1, sampling=QUICK)
    assert drawn.metadata["seed"] >= 0


def test_what_is_set_is_used_and_stored(svd: SvdPipeline) -> None:
    plain = svd.animate(noise_picture(), seed=1, sampling=QUICK)
    for change in ({"fps": 20}, {"motion": 10}, {"noise_aug": 0.5}, {"guidance": 5.0}, {"steps": 3}):
        clip = svd.animate(noise_picture(), seed=1, sampling=replace(QUICK, **change))
        assert difference(plain, clip) > 0, change
        assert clip.metadata["settings"].items() >= change.items()
    slow = svd.animate(noise_picture(), seed=1, sampling=replace(QUICK, playback=3.5))
    assert np.array_equal(slow.frames, plain.frames), "playback is the file's"
    assert (plain.fps, slow.fps) == (7, 3.5)
    assert plain.metadata["settings"]["fps"] == 7


def test_lengths_and_sizes(svd: SvdPipeline) -> None:
    assert svd.animate(noise_picture(), seed=1, seconds=0.4, sampling=QUICK).frames.shape == (3, 64, 64, 3)
    assert svd.animate(noise_picture(), seed=1, size=(128, 64), frames=1, sampling=QUICK).frames.shape == (1, 64, 128, 3)
    with pytest.warns(UserWarning, match="5 frames, tiny-svd was trained on 4"):
        assert len(svd.animate(noise_picture(), seed=1, frames=5, sampling=QUICK)) == 5
    with pytest.warns(UserWarning, match="reads no text"):
        svd.animate(noise_picture(), "a dog", seed=1, frames=1, sampling=Diffusion(steps=1))


def test_progress_and_interruption(svd: SvdPipeline) -> None:
    seen = []
    svd.animate(noise_picture(), seed=1, sampling=Diffusion(steps=4), progress=lambda phase, share: seen.append((phase, share)))
    assert [share for phase, share in seen if phase == "sampling"] == [0.25, 0.5, 0.75, 1.0]
    assert [share for phase, share in seen if phase == "decoding"][-1] == 1.0

    def stop(phase: str, share: float) -> None:
        if phase == "sampling" and share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svd.animate(noise_picture(), seed=1, sampling=Diffusion(steps=4), progress=stop)


def test_extend_keeps_what_is_there_and_goes_on_from_its_last_frame(svd: SvdPipeline) -> None:
    source = svd.animate(noise_picture(), seed=1, sampling=QUICK)
    with pytest.warns(UserWarning, match="2 clips are joined.* drifts"):
        longer = svd.extend(source, seconds=9 / 7, seed=5, sampling=QUICK)
    assert (len(longer), longer.fps) == (9, 7)
    assert np.array_equal(longer.frames[:4], source.frames)
    hop = svd.animate(source[-1:], seed=5, sampling=QUICK)
    assert np.array_equal(longer.frames[4:7], hop.frames[1:])
    assert longer.metadata["settings"]["source_frames"] == 4
    with pytest.raises(ValueError, match="0.57 s long already"):
        svd.extend(source, seconds=0.5)
    with pytest.raises(ValueError, match="keeps its own rate, 7"):
        svd.extend(source, seconds=2, sampling=Diffusion(playback=12))


def test_text_becomes_a_picture_and_then_moves(svd: SvdPipeline, tiny_model: Path) -> None:
    clip = svd.generate("a red ball", seed=3, first=str(tiny_model), sampling=QUICK)
    assert clip.frames.shape == (4, 64, 64, 3)
    assert (clip.metadata["prompt"], clip.metadata["task"]) == ("a red ball", "generate")
    assert clip.metadata["settings"]["first"] == str(tiny_model)
    other = svd.generate("make the box blue", seed=3, first=str(tiny_model), sampling=QUICK)
    assert difference(clip, other) > 0, "the prompt steers the first frame"


def test_the_first_frame_of_a_flow_is_handed_over_in_floating_point(tiny_model: Path) -> None:
    from reelflow.pipelines import load
    from reelflow.pipelines.svd.first_frame import paint

    painted = paint(str(tiny_model), "a red ball", 3, 64, 64, torch.device("cpu"), silent)
    assert painted.dtype == np.float32
    flow = load(tiny_model, "cpu").generate("a red ball", seed=3, frames=1).frames[0]
    assert np.abs(painted * 255 - flow).max() <= 0.5 + 1e-3
    assert np.abs(painted * 255 - np.round(painted * 255)).max() > 0.1, "not through 8 bits"


def test_the_first_frame_of_a_diffusers_pipeline(svd: SvdPipeline, tmp_path: Path) -> None:
    folder = tiny["write_text_to_image"](tmp_path / "painter")
    clip = svd.generate("a red ball", seed=3, first=str(folder), sampling=QUICK)
    assert clip.frames.shape == (4, 64, 64, 3)
    assert clip.metadata["settings"]["first"] == str(folder)


def test_painters_that_paint_nothing(svd: SvdPipeline, tmp_path: Path) -> None:
    svd_folder = tiny["write_tiny"](tmp_path / "tiny-svd")
    for first in (str(svd_folder), "nobody/nothing"):
        with pytest.raises(ValueError, match="no text-to-image model can be loaded"):
            svd.generate("a red ball", first=first, sampling=QUICK)
    with pytest.raises(ValueError, match="is empty"):
        svd.generate(" ", sampling=QUICK)


def test_what_it_does_not_do(svd: SvdPipeline) -> None:
    for call in (svd.edit, svd.score, svd.encode, svd.decode):
        with pytest.raises(ValueError, match="use a starflow-v model"):
            call()
    with pytest.raises(ValueError, match="cannot stream"):
        svd.stream("x")


@pytest.mark.parametrize("broken", ["encoder", "image_encoder", "denoiser", "decoder"])
def test_values_that_are_not_finite_stop(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    svd = SvdPipeline(tiny["tiny_parts"]())
    weight = {
        "encoder": lambda: svd.encoder.quant_conv.bias, "image_encoder": lambda: svd.image_encoder.visual_projection.weight,
        "denoiser": lambda: svd.denoiser.conv_out.bias, "decoder": lambda: svd.decoder.conv_out.bias,
    }[broken]()  # fmt: skip
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite; use --precision float32"):
        svd.animate(noise_picture(), seed=1, frames=1, sampling=QUICK)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")]
)
def test_out_of_memory_says_what_would_fit(error: Exception, svd: SvdPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(svd.denoiser, "forward", fail)
    monkeypatch.setattr("reelflow.pipelines.svd.memory.free_bytes", lambda device: activation_bytes(svd, 1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"^out of memory with 4 frames of 64 × 64; --frames 3 would fit$"):
        svd.animate(noise_picture(), seed=1, sampling=QUICK)
    assert what_fits(svd, 25, 576, 1024, activation_bytes(svd, 1, 25, 384, 640)) == "--size 640x384 would fit"
    monkeypatch.setattr(svd.denoiser, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        svd.animate(noise_picture(), seed=1, sampling=QUICK)

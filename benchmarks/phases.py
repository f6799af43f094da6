"""The parts of `h200.py`: what each measures, on what. Every part is a function of the machine and returns JSON-able numbers.

Shapes: B clips, F latent frames, C latent channels, h × w places.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rig import VAE, Machine, Missing
from torch import Tensor

from reelflow.config import FlowConfig
from reelflow.denoise import denoise, denoise_frames
from reelflow.evaluation.published import Published
from reelflow.flow import StarFlow, from_tokens
from reelflow.sampling import Schedule, certify, sample, schedules, stream
from reelflow.sampling.conditioner import Conditioner
from reelflow.sampling.deep import deep_frames
from reelflow.sampling.inverse import Shallow
from reelflow.sampling.replay import Replay

FLOPS, BYTES = 790e12, 4.3e12
"""What a H200 reaches: bfloat16 products of random numbers, and copies; per second."""
WIDTH = {"float32": 4, "bfloat16": 2, "fp8": 1}
GUIDANCE, TOLERANCE = 1.0, 3e-2
"""The tolerance is the default of precisions below float32."""


def work(config: FlowConfig, model: StarFlow, rows: int, context: float, precision: str) -> dict[str, float]:
    """What a pass of the deep block over `rows` (all branches) needs, and the seconds that takes at least."""
    weights = sum(weight.numel() for weight in model.deep_block.layers.parameters())
    wide = config.deep_width * config.layers[-1]
    branches = 2 if GUIDANCE else 1
    flops = {"gemm": 2.0 * weights * rows, "attention": 4.0 * wide * context * rows}
    moved = {"gemm": weights * WIDTH[precision], "attention": 2.0 * wide * context * branches * max(2, WIDTH[precision])}
    peak = {"gemm": FLOPS * (2 if precision == "fp8" else 1), "attention": FLOPS}
    floor = sum(max(flops[part] / peak[part], moved[part] / BYTES) for part in flops)
    return {"flops": sum(flops.values()), "bytes": sum(moved.values()), "floor": floor}


def rated(needs: dict[str, float], seconds: float, passes: int = 1) -> dict[str, float]:
    return {
        "ms_per_pass": 1e3 * seconds / passes, "floor_ms_per_pass": 1e3 * needs["floor"],
        "share_of_flops": needs["flops"] * passes / seconds / FLOPS, "share_of_bytes": needs["bytes"] * passes / seconds / BYTES,
    }  # fmt: skip


def rates(at: Machine) -> dict[str, Any]:
    """What this card does at its best, measured on random numbers."""
    side, device = at.size.square, at.device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(side * side, device=device)
    target = torch.empty_like(source)
    at.timed(lambda: a @ b, 3)
    product, copy = at.timed(lambda: a @ b, 10)[0], at.timed(lambda: target.copy_(source), 10)[0]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "device": name, "torch": torch.__version__, "latents": list(at.size.latents),
        "tflops": 2e-12 * side**3 / product, "tbytes": 8e-12 * side**2 / copy,
    }  # fmt: skip


def build(at: Machine, precision: str) -> dict[str, Any]:
    seconds, model = at.timed(lambda: at.model(precision))
    return {"seconds": seconds, "parameters": sum(weight.numel() for weight in model.parameters())}


@torch.no_grad()
def one_pass(at: Machine, precision: str, window: int, graph: bool) -> dict[str, Any]:
    """A pass of the deep block in the middle of the video."""
    model, (frames, *size) = at.model(precision), at.size.latents
    stride = size[0] * size[1]
    reader = Conditioner(model, model.deep_block, 1, (size[0], size[1]), frames * stride, GUIDANCE)
    for store in (reader.cache.keys, reader.cache.values):
        store.normal_()
    used = frames * stride // 2
    tokens = torch.randn(1, window, model.config.channels, device=at.device)
    place = torch.arange(used - window, used, device=at.device)[None]
    replay = Replay(at.device if graph else torch.device("cpu"))
    run = partial(replay, "pass", lambda: reader(tokens, place, used))
    at.timed(run, 3)
    seconds, _ = at.timed(run, 20)
    return {"seconds": seconds, **rated(work(model.config, model, 2 * window, used + model.config.text_tokens, precision), seconds)}


def replays(graph: bool) -> AbstractContextManager[Any]:
    """Passes as graphs, or each launched by the host."""
    return nullcontext() if graph else patch.object(schedules, "Replay", lambda device: Replay(torch.device("cpu")))


@torch.no_grad()
def deep(at: Machine, precision: str, window: int, graph: bool = True, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The deep block over the whole video."""
    model, reports = at.model(precision), {}
    schedule, frames = Schedule(tolerance=tolerance, window=window), at.noise.shape[1]

    def run() -> Tensor:
        return torch.stack([*deep_frames(model, at.noise, at.texts, GUIDANCE, None, reports, False, schedule=schedule)], 1)

    with replays(graph):
        seconds, u = at.timed(run)
    if not torch.isfinite(u).all():
        raise ValueError("values are not finite")
    at.kept(u=u)
    report, places = reports["deep"], at.noise[0, :, 0].numel()
    mean = model.config.text_tokens + places / 2
    needs = work(model.config, model, 2 * report.evaluations // report.passes, mean, precision)
    return {
        "seconds": seconds, "floor": needs["floor"] * report.passes, "passes": report.passes, "evaluations": report.evaluations / places,
        "frames": frames, "tolerance": tolerance, **rated(needs, seconds, report.passes),
    }  # fmt: skip


@torch.no_grad()
def shallow(at: Machine, precision: str) -> dict[str, Any]:
    model, u = at.model(precision), at.kept().get("u", at.noise.flatten(3).transpose(2, 3))
    frames, *size = at.size.latents
    blocks = Shallow(model, frames, (size[0], size[1]), Schedule(tolerance=TOLERANCE), schedules.silent)
    seconds, x = at.timed(lambda: blocks(u))
    at.kept(latents=from_tokens(x, *size))
    weights = sum(weight.numel() for weight in model.shallow_blocks.parameters())
    flops = 2.0 * weights * blocks.report.evaluations / len(model.shallow_blocks) * frames
    return {"seconds": seconds, "floor": flops / FLOPS, "passes": blocks.report.passes, "share_of_flops": flops / seconds / FLOPS}


def denoiser(at: Machine, precision: str) -> dict[str, Any]:
    model, latents = at.model(precision), at.kept().get("latents", at.noise)
    at.timed(lambda: denoise(model, latents[:, :1], at.texts[:1]))
    seconds, clean = at.timed(lambda: denoise(model, latents, at.texts[:1]), 3)
    at.kept(clean=clean)
    assert model.denoiser is not None
    config, text = model.denoiser.config, model.config.text_tokens
    tokens, seen = (places * latents[0, 0, 0].numel() + text for places in (len(latents[0]), min(len(latents[0]), config.window or 10**6)))
    weights = sum(weight.numel() for weight in model.denoiser.layers.parameters())
    flops = 2.0 * weights * tokens + 4.0 * config.width * config.layers * seen * tokens
    return {"seconds": seconds, "floor": flops / FLOPS, "share_of_flops": flops / seconds / FLOPS}


@torch.no_grad()
def vae(at: Machine, dtype: str, whose: str) -> dict[str, Any]:
    """Decoding with random weights: ours, which streams, or diffusers' own `decode`."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        raise Missing("no diffusers") from None
    from reelflow.adapters.vae import VideoCodec

    with torch.device(at.device):
        net = AutoencoderKLWan(**VAE | at.size.vae).to(getattr(torch, dtype)).eval()
    codec, latents = VideoCodec(net), at.kept().get("clean", at.noise)
    of_diffusers = latents.transpose(1, 2).to(net.dtype)
    first: list[float] = []

    def ours() -> None:
        began = at.now()
        for _ in codec.decode_frames(latents.unbind(1)):
            first.append(at.now() - began)

    run = ours if whose == "ours" else lambda: net.decode(of_diffusers).sample
    at.timed(run)
    first.clear()
    seconds, _ = at.timed(run)
    return {"seconds": seconds} | ({"first_frame": first[0]} if first else {})


def first_frame(at: Machine, precision: str) -> dict[str, Any]:
    """From noise to the first latent frame, and to the first one that is denoised, which has to wait for the look-ahead."""
    model, schedule = at.model(precision), Schedule(tolerance=TOLERANCE)
    began = at.now()
    next(source := stream(model, at.noise, at.texts, GUIDANCE, schedule=schedule))
    latent = at.now() - began
    source.close()
    began = at.now()
    next(source := denoise_frames(model, stream(model, at.noise, at.texts, GUIDANCE, schedule=schedule), lambda frame: at.texts[:1]))
    return {"seconds": latent, "denoised": at.now() - began}


def whole(at: Machine, precision: str) -> dict[str, Any]:
    """Noise to clean latents, and whether they are the sample: one parallel pass gives back the noise to so many sigma."""
    model, schedule = at.model(precision), Schedule(tolerance=TOLERANCE)
    sampling, (latents, _) = at.timed(lambda: sample(model, at.noise, at.texts, GUIDANCE, schedule=schedule))
    cleaning, _ = at.timed(lambda: denoise(model, latents, at.texts[:1]))
    found = certify(model, latents, at.noise, at.texts, GUIDANCE, schedule=schedule)
    return {"seconds": sampling + cleaning, "sampling": sampling, "residual_rms": found.rms, "residual_largest": found.largest}


def published(at: Machine, own_engine: bool, frames: int) -> dict[str, Any]:
    """The published algorithm on our engine, or all of it, on the first frames."""
    model, frames = at.model("float32" if own_engine else "bfloat16"), min(frames, at.size.latents[0])
    how = Published(own_engine=own_engine)
    seconds, (_, reports) = at.timed(lambda: how.sample(model, at.noise[:, :frames], at.texts, GUIDANCE))
    places = at.noise[0, :frames, 0].numel()
    return {
        "seconds": seconds, "frames": frames, "passes": reports["deep"].passes + reports["shallow"].passes,
        "evaluations": reports["deep"].evaluations / places,
    }  # fmt: skip

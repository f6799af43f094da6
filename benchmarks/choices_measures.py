"""What `choices.py` measures of a flow, whatever its variant.

    bits        bits per latent value of clips that training never showed, true captions
    psnr        of those clips' latents with data noise, after a Tweedie step, decoded, against the rendered frames; dB
    sampling    passes, evaluations per token, seconds and CPU seconds per clip; guidance and schedule as users get them
    long        clips of 65 frames: bits of every latent frame, and the cost of sampling them

Shapes: B batch, F latent frames, C channels, h × w places, S places of a frame, T tokens, N clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from reelflow.adapters.vae import load_codec
from reelflow.data.toybox import canonical, render, sample_scene
from reelflow.denoise import tweedie
from reelflow.evaluation.toybox import psnr
from reelflow.flow import Affine, StarFlow, order, to_tokens
from reelflow.flow.attention import Attend, attention, causal
from reelflow.flow.block import FlowBlock
from reelflow.flow.denoiser import Denoiser
from reelflow.flow.rope import Rotary, rotary
from reelflow.likelihood import HALF_LOG_TAU, add_noise, log_prob
from reelflow.pipelines import load
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Schedule, Settings, sample
from reelflow.sampling.conditioner import Conditioner
from reelflow.sampling.deep import check, conditioner
from reelflow.sampling.schedules import Solver, silent
from reelflow.training.config import TrainConfig

SEED = 777_000
"""Of the held-out scenes; the cache of training is of other series."""
LONG = 65
SIDE = 8
"""Latent places of a frame, in each direction."""
LOG2 = torch.log(torch.tensor(2.0))


@dataclass(frozen=True)
class Variant:
    """flow: keys other than those of the configuration.  patch: latent places per token, in each direction.  past: frames
    before its own that a token of the deep block sees, besides text and start token; None: all.
    """

    flow: dict[str, Any] = field(default_factory=dict)
    patch: int = 1
    past: int | None = None
    seed: int = 0


def fold(x_BFChw: Tensor, patch: int) -> Tensor:
    """Neighbouring places into channels; volume-preserving, so that likelihoods stay comparable."""
    return F.pixel_unshuffle(x_BFChw, patch) if patch > 1 else x_BFChw


class Windowed(FlowBlock):
    """A deep block whose tokens see text, start token and `past` frames before their own: read all at once what `Ring` reads
    frame by frame. Text and start token are turned along with the oldest frame seen.
    """

    past: int
    places: int

    def run(self, hidden_BTM: Tensor, table: Rotary | None, attends: list[Attend]) -> Tensor:
        if attends[0] is causal:
            attends = [self.view(self.config.text_tokens)] * len(attends)
        return super().run(hidden_BTM, table, attends)

    def turn(self, frames: int, device: torch.device) -> Rotary:
        where = torch.tensor([[0.0, 0.0, frames]], device=device)
        return rotary(where, self.config.head_dim, True, self.config.positions == "rotary_half")

    def view(self, text: int) -> Attend:
        """Every frame is one attention over a slice of the keys; frames that see all before them go together."""
        past, places, fixed = self.past, self.places, text + 1

        def run(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
            near = text + (past + 1) * places
            parts = [causal(q_BHTD[:, :, :near], k_BHTD[:, :, :near], v_BHTD[:, :, :near])]
            seen = torch.ones(places, fixed + (past + 1) * places, dtype=torch.bool, device=q_BHTD.device).tril(fixed + past * places)
            for start in range(near, q_BHTD.shape[2], places):
                stop, first = start + places, start - past * places
                sink = self.turn((first - text) // places, k_BHTD.device).rotate(k_BHTD[:, :, :fixed])
                keys = torch.cat((sink, k_BHTD[:, :, first:stop]), 2)
                values = torch.cat((v_BHTD[:, :, :fixed], v_BHTD[:, :, first:stop]), 2)
                parts.append(attention(q_BHTD[:, :, start:stop], keys, values, seen))
            return torch.cat(parts, 2)

        return run


def narrow(flow: StarFlow, variant: Variant) -> None:
    """Make the deep block a `Windowed` one where the variant says so, in place."""
    if variant.past is not None:
        flow.deep_block.__class__ = Windowed
        flow.deep_block.past, flow.deep_block.places = variant.past, (SIDE // variant.patch) ** 2  # type: ignore[assignment]


@dataclass(frozen=True)
class HeldOut:
    """Clips of 65 frames that training never showed: clean latents (N, 17, C, h, w), scaled, and canonical captions."""

    latents: Tensor
    captions: list[str]

    @classmethod
    def make(cls, config: TrainConfig, clips: int, file: Path) -> HeldOut:
        scenes = [sample_scene(SEED, index) for index in range(clips)]
        if not file.exists():
            codec = load_codec(config.vae, config.about.latent_scale)
            torch.save(torch.cat([codec.encode(render([scene], LONG)) for scene in scenes]), file)
        return cls(torch.load(file, weights_only=True), [canonical(scene) for scene in scenes])

    def noisy(self, noise_std: float) -> Tensor:
        return add_noise(self.latents, noise_std, torch.Generator().manual_seed(SEED))


def states(pipe: StarFlowPipeline, prompts: Sequence[str]) -> Tensor:
    return cast(Tensor, pipe.prompting.states(list(prompts), "1:1", image=False))


@torch.no_grad()
def bits(pipe: StarFlowPipeline, variant: Variant, held: HeldOut, window: int, piece: int = 8) -> dict[str, Any]:
    """Bits per value: mean, its standard error over clips, of every latent frame, and above those of the noise alone."""
    x, found = fold(held.noisy(pipe.flow.config.noise_std)[:, :window], variant.patch), []
    for start in range(0, len(x), piece):
        rows = slice(start, start + piece)
        found.append(log_prob(pipe.flow, x[rows], states(pipe, held.captions[rows])).per_frame)
    frames = -torch.cat(found) / (x[0, 0].numel() * LOG2)
    clips = frames.mean(1)
    floor = (HALF_LOG_TAU + 0.5 + torch.tensor(pipe.flow.config.noise_std).log()) / LOG2
    return {
        "bits": float(clips.mean()), "error": float(clips.std() / len(clips) ** 0.5), "above_noise": float(clips.mean() - floor),
        "frames": [round(float(value), 4) for value in frames.mean(0)], "clips": [round(float(value), 5) for value in clips],
    }  # fmt: skip


def quality(pipe: StarFlowPipeline, variant: Variant, held: HeldOut, window: int, clips: int = 8) -> dict[str, float]:
    """Decibels against the rendered frames: latents as the codec gives them, with data noise, and after a Tweedie step."""
    clean, x = held.latents[:clips, :window], held.noisy(pipe.flow.config.noise_std)[:clips, :window]
    found = []
    for index in range(clips):
        one = tweedie(pipe.flow, fold(x[index : index + 1], variant.patch), states(pipe, held.captions[index : index + 1]))
        found.append(F.pixel_shuffle(one, variant.patch) if variant.patch > 1 else one)
    truth = render([sample_scene(SEED, index) for index in range(clips)], 1 + 4 * (window - 1)).numpy()
    ways = {"codec": clean, "noisy": x, "tweedie": torch.cat(found)}
    decoded = {name: [pipe.codec.decode(latents[i : i + 1])[0].numpy() for i in range(clips)] for name, latents in ways.items()}
    return {name: sum(psnr(a, b) for a, b in zip(frames, truth, strict=True)) / clips for name, frames in decoded.items()}


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, and seconds and CPU seconds it took."""
    wall, busy = time.perf_counter(), time.process_time()
    return function(), time.perf_counter() - wall, time.process_time() - busy


def sampling(pipe: StarFlowPipeline, variant: Variant, prompts: Sequence[str], frames: int, **settings: Any) -> dict[str, float]:
    """Means over the prompts, a clip each, seeds 0, 1, …; seconds are of the faster of two runs."""
    rows, guidance = [], pipe.about.guidance
    for seed, prompt in enumerate(prompts):
        noise = fold(torch.randn(1, frames, 48, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)), variant.patch)
        _, both = pipe.prompting.parts([(0, [prompt])], guidance, "1:1", frames)
        texts = both if not settings.get("ring") else both[:1]
        both_runs = [timed(lambda n=noise, t=texts: sample(pipe.flow, n, t, guidance, **settings)) for _ in range(2)]
        (_, reports), tokens = both_runs[0][0], frames * noise[0, 0, 0].numel()
        deep, shallow = reports["deep"], reports["shallow"]
        rows.append({
            "deep_passes": deep.passes, "shallow_passes": shallow.passes, "deep_evaluations": deep.evaluations / tokens,
            "shallow_evaluations": shallow.evaluations / (len(pipe.flow.shallow_blocks) * noise[0, 0, 0].numel()),
            "seconds": min(run[1] for run in both_runs), "cpu_seconds": min(run[2] for run in both_runs),
        })  # fmt: skip
    return {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in rows[0]}


@torch.no_grad()
def long_bits(pipe: StarFlowPipeline, x_BFChw: Tensor, prompts: list[str], **settings: Any) -> list[float]:
    """Bits per value of every latent frame beyond the trained length, given the true ones before it, as sampling would read them."""
    flow, size = pipe.flow, (x_BFChw.shape[-2], x_BFChw.shape[-1])
    block, stride, (_, texts) = flow.deep_block, size[0] * size[1], pipe.prompting.parts([(0, prompts)], 0.0, "1:1", x_BFChw.shape[1])
    texts = texts[:1] if settings.get("ring") else texts
    u, log_det = to_tokens(x_BFChw), torch.zeros(())
    for shallow in flow.blocks[:-1]:
        u, change = flow.affine(shallow, u, size, None).forward(u)
        log_det = log_det + change
    u, log_det = order(u, block).flatten(1, 2), order(log_det, block).flatten(1, 2)
    chosen = cast(Settings, settings)
    solver = Solver("deep block", block, u, stride, Schedule("sequential"), silent)
    solver.give(u)
    reader, ring, read, found = conditioner(flow, x_BFChw, 0.0, solver.window, chosen), settings.get("ring"), 0, []
    for part in check(flow, x_BFChw, texts, 0.0, None, chosen):
        reader.read_text(part.text)
        base, new = 0 if ring else part.start * stride, slice(part.first * stride, part.stop * stride)
        solver.read(reader, base, max(base, read), new.stop)
        z, change = Affine(solver.shift[:, new], solver.scale[:, new]).forward(u[:, new])
        found.append(HALF_LOG_TAU + 0.5 * z.square() - change - log_det[:, new])
        read = new.stop if ring else 0
    per_frame = torch.cat(found, 1).unflatten(1, (-1, stride)).mean((0, 2, 3)) / LOG2
    return [round(float(value), 4) for value in per_frame]


def long(pipe: StarFlowPipeline, variant: Variant, held: HeldOut, prompt: str, clips: int = 12) -> dict[str, Any]:
    """Bits and cost beyond the trained length: windows read again, and rings."""
    x, length = held.noisy(pipe.flow.config.noise_std)[:clips], pipe.flow.config.window
    if variant.past is None:
        ways: dict[str, dict[str, Any]] = {"windows": {}, "ring": {"ring": True}, "ring of 4": {"ring": True, "window": 5}}
    else:
        ways = {"ring of 4": {"ring": True, "window": variant.past + 1}}
    rows = {}
    for name, settings in ways.items():
        found = long_bits(pipe, x, held.captions[:clips], **settings)
        rows[name] = {"bits": sum(found[length:]) / len(found[length:]), "frames": found}
        rows[name] |= {"sampling": sampling(pipe, variant, [prompt], x.shape[1], **settings)}
    return rows


def mini() -> StarFlowPipeline:
    return cast(StarFlowPipeline, load("mini", "cpu"))


def seeing_less(held: HeldOut, past: int, clips: int = 12) -> dict[str, float]:
    """What it costs the shipped model, which was trained to see all, that the deep block sees only `past` frames before: bits per
    value within the trained length, and beyond it, where a ring of so many frames is then exact.
    """
    pipe, window = mini(), past + 1
    beyond = long_bits(pipe, held.noisy(pipe.flow.config.noise_std)[:clips], held.captions[:clips], ring=True, window=window)
    narrow(pipe.flow, Variant(past=past))
    within = bits(pipe, Variant(), held, pipe.flow.config.window)["bits"]
    return {"within": within, "beyond": sum(beyond[9:]) / len(beyond[9:])}


def noise_cost(held: HeldOut, window: int, levels: Sequence[float], clips: int = 8) -> dict[str, float]:
    """Decibels of latents with so much data noise, decoded as they are: what denoising has to make good; σ 0 is the codec alone."""
    pipe, truth = mini(), render([sample_scene(SEED, index) for index in range(clips)], 1 + 4 * (window - 1)).numpy()
    found = {}
    for level in levels:
        x = held.noisy(level)[:clips, :window]
        decoded = [pipe.codec.decode(one[None])[0].numpy() for one in x]
        found[f"{level:g}"] = sum(psnr(a, b) for a, b in zip(decoded, truth, strict=True)) / clips
    return found


def latency(repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds until the first frame of `stream`, by the denoiser's layers and how many of them look ahead (its weights do not matter)."""
    pipe, rows = mini(), []
    prompt = "a red ball moves right on a black background"
    for layers in (2, 8):
        for ahead in ("first", "all"):
            assert pipe.flow.config.denoiser is not None
            about = pipe.flow.config.denoiser.model_copy(update={"layers": layers, "look_ahead_layers": ahead})
            pipe.flow.config = pipe.flow.config.model_copy(update={"denoiser": about})
            pipe.flow.denoiser = Denoiser(pipe.flow.config).eval().requires_grad_(False)
            runs = [timed(lambda: next(pipe.stream(prompt, seed=0))) for _ in range(repeats)]
            frames = 1 + sum(a - 1 for a in pipe.flow.denoiser.ahead)
            rows.append({
                "layers": layers, "look_ahead_layers": ahead, "frames_waited_for": min(frames, pipe.flow.config.window),
                "seconds": min(run[1] for run in runs), "cpu_seconds": min(run[2] for run in runs),
            })  # fmt: skip
    return rows


@torch.no_grad()
def pass_cost(flow: StarFlow, patch: int, tokens: int = 32, repeats: int = 15) -> dict[str, float]:
    """Milliseconds of CPU of one pass over `tokens` tokens with guidance, 4 latent frames being known; weights do not matter."""
    side = SIDE // patch
    text = torch.zeros(2, flow.config.text_tokens, flow.config.text_dim)
    found = {}
    for name, block, frames in (("deep", flow.deep_block, 4), ("shallow", flow.blocks[0], 0)):
        stride, guidance = side * side, 1.0 if block is flow.deep_block else 0.0
        tokens = min(tokens, stride)
        reader = Conditioner(flow, block, 1, (side, side), (frames + 2) * stride, guidance)
        reader.read_text(text)
        place, x = torch.arange(tokens)[None] + frames * stride, torch.zeros(1, tokens, flow.config.channels)
        runs = [timed(lambda r=reader, x=x, p=place, used=(frames + 1) * stride: r(x, p, used))[2] for _ in range(repeats)]
        found[name] = round(1e3 * sorted(runs)[repeats // 4], 3)
    return found


def measure(pipe: StarFlowPipeline, variant: Variant, held: HeldOut, prompts: Sequence[str], goes_on: bool) -> dict[str, Any]:
    config = pipe.flow.config
    ring: dict[str, Any] = {} if variant.past is None else {"ring": True, "window": variant.past + 1}
    heads = config.num_kv_heads or config.deep_width // config.head_dim
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for block in pipe.flow.blocks for p in block.parameters()),
        "cached_values_per_frame": 2 * config.layers[-1] * heads * config.head_dim * (SIDE // variant.patch) ** 2,
        **bits(pipe, variant, held, config.window), "psnr": quality(pipe, variant, held, config.window),
        "sampling": sampling(pipe, variant, prompts, config.window, **ring),
    }  # fmt: skip
    if goes_on:
        row["long"] = long(pipe, variant, held, prompts[0])
    return row

"""How fast sampling is, and how close to the sequential answer: one model, every sampler on the same noise.

    reelflow bench --model mini --json

Measured is sampling alone, noise to latents: text is encoded before, and neither denoiser nor decoder runs. Each row:

Compared are the sequential sampler, the published one (`evaluation.published`), and ours at several tolerances and windows.

    passes                 network passes of the deep block, and of all shallow blocks together
    evaluations            how often a token went through the deep block, and through a shallow one, on average
    seconds                of a whole clip, median of the repeats; schedules take turns, so that a busy minute harms all alike
    tokens_per_second      tokens of all clips (batch · latent frames · places) / seconds
    first_frame_seconds    until the latents of the first latent frame are final in all blocks: the same schedule on the first
                           frame's noise alone, which by causality gives that very frame of the clip
    rms_error              root mean square of the latents' error against sequential, relative to that of the latents
    max_error              largest error of a latent value (a unit is one standard deviation of the codec's latents)
    peak_memory            bytes; on a GPU allocated during that row, on a CPU the process's most so far (one number for all)
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from reelflow.evaluation.doctor import examine
from reelflow.evaluation.published import FixedChunks
from reelflow.flow import StarFlow
from reelflow.pipelines import load
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Report, Schedule, sample

PROMPTS = ("a red ball moves right on a black background",)
Progress = Callable[[str, float], None]


def run(
    model: str = "mini", device: str | None = None, precision: Literal["float32", "bfloat16"] = "float32",
    tolerances: Sequence[float] = (1e-2, 1e-3, 1e-4), windows: Sequence[int] = (16, 32, 64), prompts: Sequence[str] = PROMPTS,
    published: Sequence[float] = (1e-3, 1e-5, 1e-6), seed: int = 0, frames: int | None = None, guidance: float | None = None,
    repeats: int = 3,
    progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmark a model: sequential, the published sampler, and Jacobi at every tolerance and window.

    Args:
        tolerances, windows: of the Jacobi schedules, see `Schedule`.
        published: tolerances of the published sampler (shares of a mean square; its own is 1e-3).
        prompts: one clip each, sampled as one batch.
        seed: of the noise, 0 ….
        frames: video frames of a clip, by default the trained length; at most that.
        guidance: weight, by default the model's own.
        repeats: how often each schedule is timed, 1 ….

    Returns:
        JSON-able: model, settings, machine, and `rows`.

    Raises:
        ValueError: unknown model, one that is no flow, or a setting that is not usable.
    """
    if repeats < 1 or not prompts:
        raise ValueError(f"repeats {repeats}, {len(prompts)} prompts: give at least one of each")
    ours = [Schedule("jacobi", tolerance, window) for tolerance in tolerances for window in windows]
    schedules: list[Schedule | FixedChunks] = [
        Schedule("sequential"),
        *(FixedChunks(tolerance=tolerance) for tolerance in published),
        *ours,
    ]
    pipe = load(model, device, precision)
    if not isinstance(pipe, StarFlowPipeline):
        raise ValueError(f"{model} is no flow; the sampling of flows is what this measures")
    shape = pipe.codec.latent_shape(frames or pipe.about.frames, *pipe.framing.frame_size("1:1"))
    if shape[0] > pipe.flow.config.window:
        raise ValueError(f"frames {frames}: longer than the trained length of {pipe.about.frames}; give at most that")
    guidance = (pipe.about.guidance if guidance is None else guidance) if pipe.text else 0.0
    texts = [*prompts, *([""] * len(prompts) if guidance else [])]
    noise = torch.randn(len(prompts), shape[0], pipe.flow.config.channels, *shape[1:], generator=torch.Generator().manual_seed(seed))
    states = pipe.prompting.states(texts, "1:1", image=shape[0] == 1)
    machine = examine()
    return {
        "model": pipe.about.name, "revision": pipe.about.revision, "device": str(pipe.device), "precision": precision,
        "guidance": guidance, "batch": len(prompts), "seed": seed, "repeats": repeats,
        "latents": {"frames": shape[0], "height": shape[1], "width": shape[2], "tokens": shape[0] * shape[1] * shape[2]},
        "machine": {topic: machine[topic] for topic in ("system", "processor", "memory", "gpu")} | {"torch": torch.__version__},
        "rows": measure(pipe.flow, noise.to(pipe.device), states, guidance, schedules, repeats, progress),
    }  # fmt: skip


def measure(
    flow: StarFlow, noise_BFChw: Tensor, states: Tensor | None, guidance: float, schedules: Sequence[Schedule | FixedChunks],
    repeats: int = 3, progress: Progress = lambda phase, share: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per schedule, the first of which (sequential) is the one that errors are against."""
    device, frames, places = noise_BFChw.device, noise_BFChw.shape[1], noise_BFChw[0, 0, 0].numel()

    def timed(schedule: Schedule | FixedChunks, noise: Tensor) -> tuple[float, Tensor, dict[str, Report]]:
        began = now(device)
        if isinstance(schedule, FixedChunks):
            latents, reports = schedule.sample(flow, noise, states, guidance)
        else:
            latents, reports = sample(flow, noise, states, guidance, schedule=schedule)
        return now(device) - began, latents, reports

    timed(schedules[-1], noise_BFChw[:, :1])  # warm up
    whole: list[list[float]] = [[] for _ in schedules]
    first: list[list[float]] = [[] for _ in schedules]
    rows: list[dict[str, Any]] = [{} for _ in schedules]
    wanted = noise_BFChw
    for repeat in range(repeats):
        for index, schedule in enumerate(schedules):
            progress("benchmark", (repeat * len(schedules) + index) / (repeats * len(schedules)))
            reset_peak(device)
            seconds, latents, reports = timed(schedule, noise_BFChw)
            whole[index].append(seconds)
            first[index].append(timed(schedule, noise_BFChw[:, :1])[0])
            if repeat:
                continue
            wanted = latents if index == 0 else wanted
            deep, shallow, parallel = reports["deep"], reports["shallow"], schedule.sampler != "sequential"
            rows[index] = {
                "sampler": schedule.sampler,
                "tolerance": schedule.tolerance if parallel else None,
                "window": schedule.window if parallel else 1,
                "passes": {"deep": deep.passes, "shallow": shallow.passes},
                "evaluations": {
                    "deep": deep.evaluations / (frames * places),
                    "shallow": shallow.evaluations / max(1, len(flow.shallow_blocks) * places),
                },
                "residual": max(deep.residual, shallow.residual),
                "rms_error": float((latents - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()),
                "max_error": float((latents - wanted).abs().max()),
                "peak_memory": peak_memory(device),
            }
    for row, seconds_whole, seconds_first in zip(rows, whole, first, strict=True):
        row["seconds"] = statistics.median(seconds_whole)
        row["first_frame_seconds"] = statistics.median(seconds_first)
        row["tokens_per_second"] = len(noise_BFChw) * frames * places / row["seconds"]
    progress("benchmark", 1.0)
    return rows


def now(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on the GPU since `reset_peak`, or the most this process has held; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


COLUMNS = (
    "sampler", "tolerance", "window", "passes deep + shallow", "evaluations", "seconds", "first frame", "tokens/s", "rms error",
    "max error", "peak MiB",
)  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows of `run`, for reading."""

    def cells(row: dict[str, Any]) -> Iterable[str]:
        yield row["sampler"]
        yield "" if row["tolerance"] is None else f"{row['tolerance']:g}"
        yield str(row["window"])
        yield f"{row['passes']['deep']} + {row['passes']['shallow']}"
        yield f"{row['evaluations']['deep']:.2f} + {row['evaluations']['shallow']:.2f}"
        yield f"{row['seconds']:.3f}"
        yield f"{row['first_frame_seconds']:.3f}"
        yield f"{row['tokens_per_second']:,.0f}"
        yield f"{row['rms_error']:.1e}"
        yield f"{row['max_error']:.1e}"
        yield "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"

    lines = [COLUMNS, *(tuple(cells(row)) for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    latents, machine = result["latents"], result["machine"]
    head = (
        f"{result['model']} revision {result['revision']} on {result['device']} ({machine['processor']['name']}), {result['precision']}, "
        f"batch {result['batch']}, {latents['frames']} × {latents['height']} × {latents['width']} latents, guidance {result['guidance']:g}"
    )
    return "\n".join([head, *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)])

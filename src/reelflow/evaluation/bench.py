"""How fast sampling is, and how close to the sequential answer: one model, every sampler on the same noise.

    reelflow bench --model mini --json

Measured is sampling alone, noise to latents: text is encoded before, and neither denoiser nor decoder runs. Compared are the
sequential sampler, the published one (`evaluation.published`: as it ran, and its algorithm on our engine), and ours at several
tolerances and windows. Errors are against sequential sampling in float32, whatever the precision. Each row:

    passes                 network passes of the deep block, and of all shallow blocks together
    evaluations            how often a token went through the deep block, and through a shallow one, on average
    seconds, cpu_seconds   of a whole clip, median of the repeats: on the clock, and of this process's own work on all cores, which
                           is less where other programs run
    times_faster           than the first sequential row, and than the published sampler: medians of the ratios within a repeat.
                           Schedules take turns, so that a busy minute harms all alike
    tokens_per_second      tokens of all clips (batch · latent frames · places) / seconds
    first_frame_seconds    once: until the latents of the first latent frame are final in all blocks: the same schedule on the first
                           frame's noise alone, which by causality gives that very frame of the clip
    rms_error              root mean square of the latents' error against sequential, relative to that of the latents
    max_error              largest error of a latent value (a unit is one standard deviation of the codec's latents)
    peak_memory            most bytes held beyond the loaded models: on a GPU what was allocated, on a CPU under Linux what was
                           resident (what an earlier row gave back, and the system kept, is missing there), elsewhere None
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from reelflow.adapters.precision import settle
from reelflow.evaluation.doctor import examine
from reelflow.evaluation.published import Published
from reelflow.flow import StarFlow
from reelflow.pipelines import Precision, load
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Report, Schedule, sample

PROMPTS = ("a red ball moves right on a black background",)
TOLERANCES = {"float32": (1e-2, 1e-3, 1e-4)}
COARSE = (1e-1, 3e-2, 1e-2)
"""Below float32: there rounding keeps tokens moving, and one that is asked to lie stiller is waited for in vain."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    """One row: a sampler and the precision of the network it runs."""

    schedule: Schedule | Published
    precision: str

    def sample(self, flow: StarFlow, noise_BFChw: Tensor, states: Tensor | None, guidance: float) -> tuple[Tensor, dict[str, Report]]:
        if isinstance(self.schedule, Published):
            return self.schedule.sample(flow, noise_BFChw, states, guidance)
        return sample(flow, noise_BFChw, states, guidance, schedule=self.schedule)


def ours(precision: str) -> list[Schedule]:
    """Our schedules that are worth a row in that precision."""
    return [Schedule("jacobi", tolerance, window) for tolerance in TOLERANCES.get(precision, COARSE) for window in (32, 64)]


def cases(schedules: Mapping[Precision, Sequence[Schedule]], published: Sequence[float]) -> list[Case]:
    """Sequential in float32 first, which errors are against; the published sampler as it ran; and in each precision the others."""
    found = [Case(Schedule("sequential"), "float32"), Case(Published(), "float32")]
    for precision, own in schedules.items():
        rest: list[Schedule | Published] = [*(Published(tolerance, own_engine=False) for tolerance in published), *own]
        found += [Case(schedule, precision) for schedule in [*[Schedule("sequential")] * (precision != "float32"), *rest]]
    return found


def run(
    model: str = "mini", device: str | None = None, schedules: Mapping[Precision, Sequence[Schedule] | None] = {"float32": None},
    published: Sequence[float] = (1e-3, 1e-4), prompts: Sequence[str] = PROMPTS, seed: int = 0, frames: int | None = None,
    guidance: float | None = None, repeats: int = 3, progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmark a model.

    Args:
        schedules: ours to measure, by precision of the network (see `adapters.precision`); None: those of `ours` in that one.
        published: tolerances of the published algorithm on our engine (shares of a mean square; its own is 1e-3).
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
    pipe = flow_pipeline(model, device)
    parameters = sum(weight.numel() for weight in pipe.flow.parameters())
    wanted = {cast(Precision, settle(asked, pipe.device, parameters)): own for asked, own in schedules.items()}
    flows: dict[str, StarFlow] = {"float32": pipe.flow}
    for precision in wanted:
        if precision not in flows:
            flows[precision] = flow_pipeline(model, device, precision).flow
    rows = cases({precision: ours(precision) if own is None else own for precision, own in wanted.items()}, published)
    noise, states, guidance = clips(pipe, prompts, seed, frames, guidance)
    machine, busy = examine(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "model": pipe.about.name, "revision": pipe.about.revision, "parameters": parameters,
        "device": str(pipe.device), "precisions": list(wanted), "guidance": guidance, "batch": len(prompts), "seed": seed,
        "repeats": repeats, "latents": dict(zip(("frames", "height", "width"), (noise.shape[1], *noise.shape[3:]), strict=True)),
        "machine": {topic: machine[topic] for topic in ("system", "processor", "memory", "gpu")} | {"torch": torch.__version__},
        "load_before": busy,
        "rows": measure(flows, noise, states, guidance, rows, repeats, progress),
    }  # fmt: skip


def flow_pipeline(model: str, device: str | None = None, precision: Precision = "float32") -> StarFlowPipeline:
    """A model that is a flow. Raises ValueError for any other."""
    pipe = load(model, device, precision)
    if not isinstance(pipe, StarFlowPipeline):
        raise ValueError(f"{model} is no flow; the sampling of flows is what this measures")
    return pipe


def clips(
    pipe: StarFlowPipeline, prompts: Sequence[str] = PROMPTS, seed: int = 0, frames: int | None = None, guidance: float | None = None
) -> tuple[Tensor, Tensor | None, float]:
    """Noise (B, F, C, h, w), text states and guidance of clips within the trained length. Raises ValueError beyond it."""
    shape = pipe.codec.latent_shape(frames or pipe.about.frames, *pipe.framing.frame_size("1:1"))
    if shape[0] > pipe.flow.config.window:
        raise ValueError(f"frames {frames}: longer than the trained length of {pipe.about.frames}; give at most that")
    guidance = pipe.prompting.guidance(guidance)
    texts = [*prompts, *([""] * len(prompts) if guidance else [])]
    noise = torch.randn(len(prompts), shape[0], pipe.flow.config.channels, *shape[1:], generator=torch.Generator().manual_seed(seed))
    return noise.to(pipe.device), pipe.prompting.states(texts, "1:1", image=shape[0] == 1), guidance


def measure(
    flows: Mapping[str, StarFlow], noise_BFChw: Tensor, states: Tensor | None, guidance: float, cases: Sequence[Case],
    repeats: int = 3, progress: Progress = lambda phase, share: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per case; errors are against the first. `flows`: the model in each precision."""
    device, frames, places = noise_BFChw.device, noise_BFChw.shape[1], noise_BFChw[0, 0, 0].numel()

    def timed(case: Case, noise: Tensor) -> tuple[float, float, Tensor, dict[str, Report]]:
        began, worked = now(device), time.process_time()
        latents, reports = case.sample(flows[case.precision], noise, states, guidance)
        return now(device) - began, time.process_time() - worked, latents, reports

    for case in cases:
        if case.schedule.sampler != "sequential":
            timed(case, noise_BFChw[:, :1])  # warm up
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    rows: list[dict[str, Any]] = [{} for _ in cases]
    wanted = noise_BFChw
    for repeat in range(repeats):
        for index, case in enumerate(cases):
            progress("benchmark", (repeat * len(cases) + index) / (repeats * len(cases)))
            memory = Memory(device)
            whole, worked, latents, reports = timed(case, noise_BFChw)
            held = memory.most()
            times[index].append((whole, worked))
            if repeat:
                continue
            wanted = latents if index == 0 else wanted
            per_token = {"deep": frames * places, "shallow": max(1, len(flows[case.precision].shallow_blocks) * places)}
            parallel = case.schedule.sampler != "sequential"
            accuracy = case.schedule.accuracy(flows[case.precision].deep_block.precision)
            rows[index] = {
                "sampler": case.schedule.sampler,
                "precision": case.precision,
                "tolerance": accuracy if parallel else None,
                "window": case.schedule.tokens(device) if parallel else 1,
                "passes": {kind: report.passes for kind, report in reports.items()},
                "evaluations": {kind: report.evaluations / per_token[kind] for kind, report in reports.items()},
                "residual": max(report.residual for report in reports.values()),
                "rms_error": float((latents - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()),
                "max_error": float((latents - wanted).abs().max()),
                "peak_memory": held,
                "first_frame_seconds": timed(case, noise_BFChw[:, :1])[0],
            }
    references = {"sequential": 0, "published": next((i for i, row in enumerate(rows) if row["sampler"] == "published"), None)}
    for row, found in zip(rows, times, strict=True):
        row["seconds"], row["cpu_seconds"] = (statistics.median(column) for column in zip(*found, strict=True))
        row["tokens_per_second"] = len(noise_BFChw) * frames * places / row["seconds"]
        row["times_faster"] = {
            name: statistics.median(other[0] / own[0] for other, own in zip(times[index], found, strict=True))
            for name, index in references.items()
            if index is not None
        }
    progress("benchmark", 1.0)
    return rows


def now(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Memory:
    """The most bytes held at a time since this was made, beyond those held then."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's mark of the most, set back
            self.before = resident("VmRSS") or 0

    def most(self) -> int | None:
        """None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        found = resident("VmHWM")
        return None if found is None else max(0, found - self.before)


def resident(field: str) -> int | None:
    """Bytes of this process in memory by the kernel's count: now (VmRSS), or at most (VmHWM). None where there is no such count."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


COLUMNS = (
    "sampler", "precision", "tolerance", "window", "passes deep + shallow", "evaluations", "seconds", "CPU s", "× sequential",
    "× published", "first frame", "tokens/s", "rms error", "max error", "MiB",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> Iterable[str]:
    """A row of `run`, for reading, in the order of `COLUMNS`."""
    yield row["sampler"]
    yield row["precision"]
    yield "" if row["tolerance"] is None else f"{row['tolerance']:g}"
    yield str(row["window"])
    yield f"{row['passes']['deep']} + {row['passes']['shallow']}"
    yield f"{row['evaluations']['deep']:.2f} + {row['evaluations']['shallow']:.2f}"
    for name in ("seconds", "cpu_seconds"):
        yield f"{row[name]:.3g}"
    for name in ("sequential", "published"):
        yield f"{row['times_faster'][name]:.2f}" if name in row["times_faster"] else ""
    yield f"{row['first_frame_seconds']:.3g}"
    yield f"{row['tokens_per_second']:,.0f}"
    yield f"{row['rms_error']:.1e}"
    yield f"{row['max_error']:.1e}"
    yield "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"


def head(result: Mapping[str, Any]) -> str:
    """What was measured, and where, in one line."""
    latents, processor = result["latents"], result["machine"]["processor"]
    return (
        f"{result['model']} revision {result['revision']}, {result['parameters'] / 1e6:.1f} M parameters, on {result['device']} "
        f"({processor['cores']} cores of {processor['name']}), batch {result['batch']}, "
        f"{latents['frames']} × {latents['height']} × {latents['width']} latents, guidance {result['guidance']:g}"
    )


def table(result: Mapping[str, Any]) -> str:
    """The rows of `run`, for reading."""
    lines = [COLUMNS, *(tuple(cells(row)) for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([head(result), *("  ".join(cell.rjust(size) for cell, size in zip(line, widths, strict=True)) for line in lines)])

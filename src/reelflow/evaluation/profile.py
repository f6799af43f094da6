"""Where the time of one clip goes: a phase after the other on the clock, and in each, through torch.profiler, what kind of work.

    reelflow bench --model mini --profile

Seconds of a phase are the median of runs without the profiler; what kinds of work they are made of is seen in one more run, of
which the profiler watches every tenth pass of the sampler, and the other phases whole. GEMM: matrix products. elementwise:
everything else that touches values (norms, activations, rotations, copies, gathers). host: time in which none of these ran, that
is Python, dispatch, views, and on a GPU all waiting; in the phases that do not run in torch (writing), all of it.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from reelflow.clip import Clip
from reelflow.denoise import denoise
from reelflow.evaluation.bench import PROMPTS, Progress, flow_pipeline, now
from reelflow.flow import from_tokens
from reelflow.pipelines import Precision
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Schedule
from reelflow.sampling.deep import deep_frames
from reelflow.sampling.inverse import Shallow
from reelflow.sampling.schedules import Progress as Tick
from reelflow.sampling.schedules import silent

SAMPLING = ("deep", "shallow")
KINDS = ("GEMM", "attention", "convolution", "elementwise", "host")
_PATTERNS = (
    ("host", re.compile(
        r"aten::(view|_reshape_alias|reshape|_unsafe_view|transpose|t|as_strided|slice|select|expand|expand_as|unsqueeze|squeeze|flatten|"
        r"unflatten|split|split_with_sizes|chunk|detach|empty|empty_like|empty_strided|new_empty|alias|permute|narrow|unbind|item|"
        r"_local_scalar_dense|to|lift_fresh|resolve_conj|resolve_neg|view_as_real|view_as_complex)$"
    )),
    ("attention", re.compile(r"scaled_dot_product|attention|fmha|flash|sdpa", re.IGNORECASE)),
    ("convolution", re.compile(r"conv", re.IGNORECASE)),
    ("GEMM", re.compile(r"gemm|gemv|cutlass|nvjet|mm$|::linear|matmul|_linear|splitK|addmv|::mv", re.IGNORECASE)),
)  # fmt: skip


def kind(name: str) -> str:
    """Of an operator (aten::…) or a GPU kernel, by its name."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), "elementwise")


class Watch:
    """What kinds of work are done, in the stretches that are watched.

    `tick` marks the end of a stretch; of those between two ticks every `every`-th is watched, from the first on.
    """

    def __init__(self, device: torch.device, every: int = 10):
        self.device, self.every, self.ticks, self.watched = device, every, 0, 0
        self.cuda = device.type == "cuda"
        self.kinds, self.seconds = dict.fromkeys(KINDS, 0.0), 0.0
        self.profiler: profile | None = None

    def start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces every start and stop on stderr
        self.profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda])
        self.profiler.start()
        self.began = now(self.device)

    def stop(self) -> None:
        assert self.profiler is not None
        self.seconds, self.watched = self.seconds + now(self.device) - self.began, self.watched + 1
        self.profiler.stop()
        for event in self.profiler.key_averages():
            if self.cuda and event.device_type == DeviceType.CUDA:
                self.kinds[kind(event.key)] += event.self_device_time_total / 1e6
            elif not self.cuda and event.key.startswith(("aten::", "mkldnn::", "onednn::")):
                self.kinds[kind(event.key)] += event.self_cpu_time_total / 1e6
        self.profiler = None

    def tick(self, tokens: int = 0) -> None:
        """A sampler's progress."""
        if self.profiler:
            self.stop()
        elif self.ticks % self.every == 0:
            self.start()
        self.ticks += 1

    def end(self) -> None:
        """No more is coming; a stretch that no tick ended counts only if there is no other."""
        if self.profiler and self.watched:
            self.profiler.stop()
        elif self.profiler:
            self.stop()

    def result(self, seconds: float) -> dict[str, float]:
        """Seconds of each kind, of `seconds` in all.

        A processor is slowed down by the profiler, no kind of work more than another; a GPU is not, so there the stretches
        that were not watched count as much as those that were, and the rest is the host's.
        """
        scale = max(1, self.ticks) / self.watched if self.cuda else seconds / self.seconds
        work = {name: scale * value for name, value in self.kinds.items() if name != "host"}
        return work | {"host": max(0.0, seconds - sum(work.values()))}


def run(
    model: str = "mini", device: str | None = None, precision: Precision = "float32", frames: int | None = None, repeats: int = 3,
    schedule: Schedule = Schedule(), progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """The table of one clip, from its prompt to its file.

    Args:
        frames: video frames of the clip, by default the trained length; any length the codec takes.
        repeats: runs on the clock, 1 ….

    Returns:
        JSON-able: model, settings, and `phases`, each with its seconds and those of every kind.

    Raises:
        ValueError: unknown model, one that is no flow, or a setting that is not usable.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: give at least one")
    pipe = flow_pipeline(model, device, precision)
    shape = pipe.codec.latent_shape(frames or pipe.about.frames, *pipe.framing.frame_size("1:1"))
    times: dict[str, list[float]] = {}
    shares: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(1 + repeats + 1):  # the first warms up, the last is looked at
            for name, phase in _phases(pipe, shape, schedule, Path(folder) / "clip.mp4"):
                watch = Watch(pipe.device) if index > repeats else None
                if watch and name not in SAMPLING:
                    watch.start()
                began = now(pipe.device)
                phase(watch.tick if watch else silent)
                if watch is None:
                    times.setdefault(name, []).append(now(pipe.device) - began)
                    continue
                watch.end()
                shares[name] = watch.result(statistics.median(times[name][1:]))
            progress("profile", (1 + index) / (2 + repeats))
    return {
        "model": pipe.about.name, "revision": pipe.about.revision, "device": str(pipe.device), "precision": pipe.precision,
        "latents": dict(zip(("frames", "height", "width"), shape, strict=True)),
        "tolerance": schedule.accuracy(pipe.flow.deep_block.precision),
        "phases": [
            {"phase": name, "seconds": statistics.median(found[1:]), "kinds": shares[name]} for name, found in times.items()
        ],
    }  # fmt: skip


def _phases(
    pipe: StarFlowPipeline, shape: tuple[int, int, int], schedule: Schedule, path: Path
) -> list[tuple[str, Callable[[Tick], None]]]:
    """What `generate` does, in pieces; each keeps what the next one needs."""
    flow, frames, size = pipe.flow, shape[0], shape[1:]
    guidance, kept = pipe.prompting.guidance(None), dict[str, Any]()
    noise = torch.randn(1, frames, flow.config.channels, *size, generator=torch.Generator().manual_seed(0)).to(pipe.device)

    def text(progress: Tick) -> None:
        kept["alone"], kept["both"] = pipe.prompting.parts([(0, [PROMPTS[0]])], guidance, "1:1", frames)

    def deep(progress: Tick) -> None:
        with torch.no_grad():
            found = deep_frames(flow, noise, kept["both"], guidance, None, {}, False, schedule=schedule, progress=progress)
            kept["u"] = torch.stack(list(found), 1)

    def shallow(progress: Tick) -> None:
        with torch.no_grad():
            kept["latents"] = from_tokens(Shallow(flow, frames, size, schedule, progress)(kept["u"]), *size)

    def denoiser(progress: Tick) -> None:
        kept["clean"] = denoise(flow, kept["latents"], kept["alone"][0][1])

    def decoder(progress: Tick) -> None:
        kept["pixels"] = pipe.codec.decode(kept["clean"])

    def writing(progress: Tick) -> None:
        Clip(kept["pixels"][0].numpy(), pipe.about.fps).save(path)

    return [(phase.__name__, phase) for phase in (text, deep, shallow, denoiser, decoder, writing)]


def table(result: dict[str, Any]) -> str:
    """For reading: a phase a line, seconds and shares of the whole."""
    total = sum(row["seconds"] for row in result["phases"])
    summed = {name: sum(row["kinds"][name] for row in result["phases"]) for name in KINDS}
    lines = [("phase", "seconds", "share", *KINDS)]
    for row in [*result["phases"], {"phase": "all", "seconds": total, "kinds": summed}]:
        parts = (f"{row['kinds'][name] / total:.1%}" for name in KINDS)
        lines.append((row["phase"], f"{row['seconds']:.3f}", f"{row['seconds'] / total:.1%}", *parts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    latents = result["latents"]
    head = (
        f"{result['model']} revision {result['revision']} on {result['device']}, {result['precision']}, "
        f"{latents['frames']} × {latents['height']} × {latents['width']} latents, tolerance {result['tolerance']:g}"
    )
    return "\n".join([head, *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)])

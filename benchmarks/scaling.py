"""What longer and larger clips cost, and what the ring changes: functions for `sampling.py`, each of which returns JSON-able rows.

Shapes: B clips, F latent frames, C latent channels, h × w places.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import inputs
from memory import measure as memory
from torch import Tensor

from reelflow.adapters.checkpoint import written
from reelflow.evaluation.bench import now
from reelflow.likelihood import log_prob
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.sampling import Report, Settings, certify, sample

LENGTHS = (9, 21, 61, 121)
"""Latent frames; of four frames each after the first, so at 16 per second 21 are 5 s and 121 are 30 s."""
MODES = {"windows": Settings(), "ring": Settings(ring=True)}
RINGS = ("windows", "windows of one frame", "ring")
TALLER = ((1, 1), (1, 2), (2, 2))
"""Places of a frame, in units of the model's own height and width."""


def _in_turns(runs: dict[Any, Callable[[], dict[str, Report]]], device: torch.device, repeats: int) -> dict[Any, dict[str, Any]]:
    """Seconds (all repeats), processor seconds and reports of every run."""
    found: dict[Any, dict[str, Any]] = {key: {"times": [], "cpu": []} for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            began, worked = now(device), time.process_time()
            found[key]["reports"] = run()
            found[key]["times"].append(now(device) - began)
            found[key]["cpu"].append(time.process_time() - worked)
    return found


def lengths(pipe: StarFlowPipeline, model: str, repeats: int, frames: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    """Time of clips of `frames` latent frames, and time and memory of the last against those of the second."""
    made = {count: inputs(pipe, count) for count in frames}

    def run(count: int, mode: str) -> dict[str, Report]:
        return sample(pipe.flow, *made[count], **MODES[mode])[1]

    found = _in_turns({(count, mode): lambda c=count, m=mode: run(c, m) for count in frames for mode in MODES}, pipe.device, repeats)
    rows = [
        {
            "latent_frames": count, "mode": mode, "seconds": statistics.median(row["times"]),
            "cpu_seconds": statistics.median(row["cpu"]), "passes": row["reports"]["deep"].passes,
        }
        for (count, mode), row in found.items()
    ]  # fmt: skip
    short, long = frames[1], frames[-1]
    ratios = {}
    for mode in MODES:
        held = {count: memory(model=model, latent_frames=count, mode=mode) for count in (short, long)}
        ratios[mode] = {
            "time": statistics.median(b / a for a, b in zip(found[short, mode]["times"], found[long, mode]["times"], strict=True)),
            "cpu_time": statistics.median(b / a for a, b in zip(found[short, mode]["cpu"], found[long, mode]["cpu"], strict=True)),
            "memory": _ratio(held[long]["whole"], held[short]["whole"]),
            "memory_beyond_the_model": _ratio(held[long]["sampling"], held[short]["sampling"]),
        }
    return {"rows": rows, "short": short, "long": long, "ratios": ratios}


def _ratio(a: int | None, b: int | None) -> float | None:
    return a / b if a and b else None


def resolutions(pipe: StarFlowPipeline, repeats: int, frames: int | None = None) -> list[dict[str, Any]]:
    """Time of clips of the trained length with one, two and four times the places."""
    height, width = pipe.codec.latent_shape(1, *pipe.framing.frame_size("1:1"))[1:]
    length = frames or pipe.flow.config.window
    made = {(a, b): inputs(pipe, length, (a * height, b * width)) for a, b in TALLER}
    found = _in_turns({size: lambda s=size: sample(pipe.flow, *made[s])[1] for size in made}, pipe.device, repeats)
    return [
        {
            "height": a * height, "width": b * width,
            "seconds": statistics.median(row["times"]), "cpu_seconds": statistics.median(row["cpu"]),
            "passes": row["reports"]["deep"].passes,
            "evaluations": row["reports"]["deep"].evaluations / (length * a * height * b * width),
        }
        for (a, b), row in found.items()
    ]  # fmt: skip


def ring(pipe: StarFlowPipeline, frames: int = 41) -> dict[str, Any]:
    """How far the ring is from exact windows, by the model's own measure, in units of sigma, and what its clips are worth to it.

    A sample of one mode is read by another, which says of every token how far it is from where that mode would have put it, given
    the same frames before it and the same noise (`certify`): the root mean square beyond the first window, in which all agree.
    """
    window, (noise, texts, guidance) = pipe.flow.config.window, inputs(pipe, frames)
    modes = dict(zip(RINGS, (Settings(), Settings(context=window - 1), Settings(ring=True)), strict=True))
    made = {mode: sample(pipe.flow, noise, texts, guidance, **settings)[0] for mode, settings in modes.items()}

    def distance(of: str, by: str) -> float:
        return certify(pipe.flow, made[of], noise, texts, guidance, **modes[by]).rms * (frames / (frames - window)) ** 0.5

    def bits(latents: Tensor) -> float:
        with torch.no_grad():
            states = texts[0][1]
            return float(log_prob(pipe.flow, latents, None if states is None else states[:1]).bits_per_dim)

    return {
        "frames": frames, "window": window,
        "distance": {f"{of} → {by}": distance(of, by) for of in modes for by in modes},
        "bits_per_dim": {mode: {"first": bits(made[mode][:, :window]), "last": bits(made[mode][:, -window:])} for mode in modes},
    }  # fmt: skip


def plot(path: Path, length: dict[str, Any], resolution: list[dict[str, Any]], fps: float, step: int) -> None:
    """Seconds against the length and the size of clips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode, mark in zip(MODES, "os", strict=True):
        rows = [row for row in length["rows"] if row["mode"] == mode]
        video = [(1 + step * (row["latent_frames"] - 1)) / fps for row in rows]
        left.plot(video, [row["seconds"] for row in rows], f"{mark}-", label=mode)
        if mode == "windows":
            left.plot(video, [rows[1]["seconds"] * x / video[1] for x in video], "k:", linewidth=1, label=f"{video[1]:.0f} s, scaled")
    left.set(xlabel="seconds of video", ylabel="seconds of sampling", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False)
    places = [row["height"] * row["width"] for row in resolution]
    right.plot(places, [row["seconds"] for row in resolution], "o-", label="measured")
    right.plot(places, [resolution[0]["seconds"] * x / places[0] for x in places], "k:", linewidth=1, label="smallest, scaled")
    right.set(xlabel="places of a latent frame", ylabel="seconds of sampling", xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False)
    with written(path) as partial:
        figure.savefig(partial, format="png")

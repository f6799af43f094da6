"""Golden vectors: does the loaded code compute what the published models compute?

A golden folder holds NAME.json (`kind`, the reference's constructor arguments, sampling settings) and NAME.safetensors:
`model.*` a reference state dict, `in.*` inputs, `out.*` the reference's results in float32 on a CPU.

Shapes: B batch, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import load_into, read_weights
from reelflow.adapters.names import rename
from reelflow.adapters.reference import flow_config_from_constructor
from reelflow.flow import StarFlow
from reelflow.sampling import Schedule, sample
from reelflow.training.loss import nll

BOUND = 2e-4
"""Agreement asked of z, samples and the denoiser, absolute."""
LOG_DET_BOUND = 1e-3
"""Agreement asked of a clip's log-determinant, in nats, and of the loss."""
SAMPLERS = {"sequential": Schedule("sequential"), "jacobi": Schedule("jacobi", tolerance=0.0)}
KNOWN = re.compile(r"z|logdet|loss|denoised_score|sample(_i2v|_context\d+|_long)?(_cfg)?")


class Row(NamedTuple):
    """One comparison: the largest absolute error, the bound it must stay below, and whether it does."""

    name: str
    error: float
    bound: float
    passed: bool


class Golden(NamedTuple):
    """One set of golden vectors, in this package's terms (videos (B, F, C, h, w), images with F = 1)."""

    name: str
    model: StarFlow
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    about: dict[str, Any]


def verify(folder: str | Path) -> list[Row]:
    """Compare the loaded code with every golden vector in a folder.

    Raises:
        ValueError: the folder holds no golden vectors, or they cannot be read, in one line.
    """
    sets = sorted(path.stem for path in Path(folder).glob("*.json") if path.with_suffix(".safetensors").is_file())
    if not sets:
        raise ValueError(f"{folder}: no golden vectors here; expected NAME.json beside NAME.safetensors")
    rows: list[Row] = []
    for name in sets:
        prefix = f"{name}: " if len(sets) > 1 else ""
        try:
            rows.extend(row._replace(name=prefix + row.name) for row in compare(load(folder, name)))
        except KeyError as error:
            raise ValueError(f"{Path(folder) / name}: {error} is missing there; this golden set is incomplete") from None
    return rows


def load(folder: str | Path, name: str | None = None) -> Golden:
    """Read one set of golden vectors, by default the one named as its folder. The weights are loaded strictly.

    Raises:
        ValueError: a file is missing or is not what the format asks for.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    path = folder / f"{name}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        arguments, frames = about["reference_arguments"], about.get("latent_frames", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a description of golden vectors ({type(error).__name__} {error})") from None
    tensors = read_weights(path.with_suffix(".safetensors"))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "in": {}, "out": {}}
    for key in tensors:
        kind, _, rest = key.partition(".")
        if kind not in parts:
            raise ValueError(f"{tensors.source}: {key}: golden vectors are named model.*, in.* and out.*")
        parts[kind][rest] = tensors[key]
    unknown = [key for key in parts["out"] if not KNOWN.fullmatch(key)]
    missing = {"x", "noise"} - parts["in"].keys()
    if unknown or missing:
        wrong = f"out.{unknown[0]} has no comparison" if unknown else f"in.{min(missing)} is missing"
        raise ValueError(f"{tensors.source}: {wrong}; this is not a golden set of the known format")
    config = flow_config_from_constructor(arguments, window=frames, source=str(path))
    state = {rename(key, len(config.layers)): value for key, value in parts["model"].items()}
    state.pop(None, None)
    with torch.device("meta"):
        model = StarFlow(config)
    named = {key: value.reshape(-1) if key.endswith(".sos") else value for key, value in state.items() if key}
    load_into(model, named, "cpu", torch.float32, finite=True)
    video = about.get("kind") == "video"

    def as_video(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values if video else {key: value[:, None] if value.ndim == 4 else value for key, value in values.items()}

    return Golden(name, model, as_video(parts["in"]), as_video(parts["out"]), about)


@torch.no_grad()
def compare(golden: Golden) -> Iterator[Row]:
    """Every `out.*` of a set against this package; samples by both samplers, Jacobi at tolerance 0."""
    model, inputs, outputs = golden.model, golden.inputs, golden.outputs
    x, text = inputs["x"], inputs.get("text")

    def row(name: str, found: Tensor, wanted: Tensor, bound: float = BOUND) -> Row:
        error = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
        return Row(name, error, bound, error <= bound)

    z, log_det = model(x, text)
    found = {"z": z, "logdet": log_det.flatten(1).sum(1), "loss": nll(model, x, text).mean().reshape(1)}
    for name, value in found.items():
        if name in outputs:
            yield row(name, value, outputs[name], BOUND if name == "z" else LOG_DET_BOUND)
    if "denoised_score" in outputs:
        yield row("denoised_score", model.score(x, text), outputs["denoised_score"])
    for name in sorted(key for key in outputs if key.startswith("sample")):
        for sampler, schedule in SAMPLERS.items():
            yield row(f"{name} ({sampler})", run_sample(golden, name, schedule), outputs[name])


def run_sample(golden: Golden, name: str, schedule: Schedule) -> Tensor:
    """What `out.NAME` holds, by the given schedule: its name says whether it is guided, continues frames, or is long."""
    inputs, about = golden.inputs, golden.about
    text, guidance, prefix = inputs.get("text"), 0.0, None
    if "_cfg" in name:
        text, guidance = torch.cat((inputs["text"], inputs["text_null"])), float(about["guidance"])
    if given := re.search(r"_i2v|_context(\d+)", name):
        prefix = inputs["x"][:, : int(given[1] or 1)]
    if "_long" in name:
        long = about["long"]
        return sample(
            golden.model, inputs["noise_long"], text, guidance, window=long["window"], context=long["context"], schedule=schedule
        )[0]
    noise = inputs["noise"]
    return sample(golden.model, noise, text, guidance, prefix, window=noise.shape[1], schedule=schedule)[0]

"""The product: one contract, one file per family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reelflow.pipelines.base import Device, Encoding, Pipeline, Precision, Score

if TYPE_CHECKING:
    from reelflow.pipelines.loading import Asked

FULL = ("auto", "float32")
"""Precisions of which weights in half precision are not enough."""


def load(
    source: str | Path, device: Device | None = None, precision: Precision = "auto", memory_budget: str | None = None,
    clip: Asked | None = None,
) -> Pipeline:  # fmt: skip
    """Load a model: a packaged name ("mini"), a model folder, a reference checkpoint file, or a Hugging Face id.

    Under torchrun all processes load one model together, and make every clip together: each makes the same calls and gets the
    same results, "cuda" is the GPU of its own number.

    Args:
        device: "cpu", "cuda", …; by default a GPU if there is one.
        precision: of the transformer layers; what moves the flow's values stays float32. "auto": bfloat16 for large flows where
            that is fast, else float32 (see `adapters.precision`).
        memory_budget: "24GB", "800MiB": of the device. The best way of running the model that keeps within it is chosen (of a flow
            before anything is loaded), said in a warning, and stored in every clip. What does not fit stays in the host's memory.
        clip: what the budget is for, by default a clip of the trained length from a prompt; see `pipelines.loading.Asked`.

    Raises:
        ValueError: unknown model, missing or unfitting files, a family that is not here, a number of processes that cannot
            run this model together.
    """
    from reelflow.adapters.hub import resolve
    from reelflow.adapters.precision import PRECISIONS
    from reelflow.adapters.torchrun import join

    budget = None
    if memory_budget is not None:
        from reelflow.pipelines.budget import parse

        budget = parse(memory_budget)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    place = resolve(source, half=precision not in FULL)
    family, device = _kind(place), _device(device)
    if join(device) > 1 and not family.shares:
        raise ValueError(f"{source}: models of this family run in one process each; start it without torchrun")
    return family.load(place, device, precision, budget=budget, asked=clip)


def kind(source: str | Path, precision: Precision = "auto") -> type[Pipeline]:
    """The class of the pipeline that `load` would give; at most fetched, not loaded. Raises ValueError for an unknown model."""
    from reelflow.adapters.hub import resolve

    return _kind(resolve(source, half=precision not in FULL))


def _kind(place: Path) -> type[Pipeline]:
    from reelflow.adapters.svd import is_svd
    from reelflow.pipelines.starflow import StarFlowPipeline
    from reelflow.pipelines.svd import SvdPipeline

    return SvdPipeline if is_svd(place) else StarFlowPipeline


def _device(asked: Device | None) -> Device:
    """The device asked for, or a GPU if there is one. Raises ValueError where PyTorch cannot use it."""
    import torch

    from reelflow.adapters.torchrun import own_device

    found = own_device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:  # its wording for what this build or this machine lacks
        reason = str(error).splitlines()[0].partition(":")[0][:100]
        raise ValueError(f"device {str(asked)!r} cannot be used here ({reason}); use cpu, or see: reelflow doctor") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no values; use cpu, or see: reelflow doctor")
    return device


__all__ = ["Encoding", "Pipeline", "Score", "kind", "load"]

"""The product: one contract, one file per family."""

from __future__ import annotations

from pathlib import Path

from reelflow.pipelines.base import Device, Encoding, Pipeline, Precision, Score


def load(source: str | Path, device: Device | None = None, precision: Precision = "float32") -> Pipeline:
    """Load a model: a packaged name ("mini"), a model folder, or a Hugging Face id.

    Args:
        device: "cpu", "cuda", …; by default a GPU if there is one.
        precision: of the transformer layers' products; what moves the flow's values stays float32.

    Raises:
        ValueError: unknown model, missing or unfitting files, a family that is not here.
    """
    import torch

    from reelflow.adapters.hub import resolve
    from reelflow.pipelines.starflow import StarFlowPipeline

    folder = resolve(source)
    if not folder.is_dir():
        raise ValueError(f"{folder}: a single file; turn it into a model folder with: reelflow models convert {folder} -o FOLDER")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision {precision!r} is not one of float32, bfloat16")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no CUDA GPU here; use --device cpu")
    return StarFlowPipeline.load(folder, chosen, precision)


__all__ = ["Encoding", "Pipeline", "Score", "load"]

"""What a model folder holds, read from its configurations and the headers of its weights; no values are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reelflow.adapters.hub import licence_notice, resolve
from reelflow.adapters.lora import OWN
from reelflow.adapters.svd import is_svd, read_about
from reelflow.config import FlowConfig, ModelConfig

PARTS, SVD_PARTS = ("transformer", "vae", "text_encoder"), ("unet", "vae", "image_encoder")


def describe(source: str) -> dict[str, Any]:
    """A model's card, JSON-able: `ModelConfig`, `flow` (FlowConfig), `parameters` per block and part, `disk`, `readme`.

    Raises:
        ValueError: no such model, or not a model folder.
    """
    folder = resolve(source)
    if not folder.is_dir():
        raise ValueError(f"{folder}: a single file; turn it into a model folder with: reelflow models convert {folder} -o FOLDER")
    diffuses = is_svd(folder)
    about = read_about(folder) if diffuses else ModelConfig.read(folder / "config.json")
    flow = {} if diffuses else FlowConfig.read(folder / "transformer" / "config.json").model_dump(mode="json")
    counts: Counter[str] = Counter()
    for part in SVD_PARTS if diffuses else PARTS:
        for name, values in _tensors(folder / part):
            counts[_block(name) if part == "transformer" else part] += values
    bytes_held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    readme = folder / "README.md"
    return about.model_dump(mode="json") | {
        "folder": str(folder), "flow": flow, "parameters": {**counts, "total": counts.total()},
        "bytes": bytes_held, "disk": f"{bytes_held / 1e6:.1f} MB", "notice": licence_notice(source) or licence_notice(about.licence),
        "readme": readme.read_text(encoding="utf-8") if readme.is_file() else "",
    }  # fmt: skip


def _block(name: str) -> str:
    """`shallow_blocks.0` of shallow_blocks.0.layers.…, `deep_block` of deep_block.…"""
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if second.isdigit() else first


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and number of values of every tensor in a part's safetensors files; an adapter there adds to weights, not to their number."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(path for path in folder.glob("*.safetensors") if path.name != OWN):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    size = 1
                    for side in file.get_slice(name).get_shape():
                        size *= side
                    yield name, size
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch or convert the model again") from None

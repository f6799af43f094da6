"""A deeper model that begins as the one it comes from, for `init` of a training configuration: mini's revision 7 was grown from revision 6.

    python examples/deepen.py mini runs/deeper --after 1 3 --places 64

Every new layer of the deep block is a copy of the one before it whose outputs are zero, so that nothing changes before it learns.
`--places` adds an embedding of the places of a latent frame to what the blocks read: zero in the shallow ones, in the deep one rows,
columns and their sines, small (0.15 of root mean square), which does change the model a little.

    python examples/deepen.py mini runs/editor --after 1 --back 9 5

`--back`: the new layers begin with their eyes on the same place of the frame so many latent frames before, which for an edit of 9 latent
frames is that of the source: half of their heads for 9, half for 5 here. Where to look is learned on from there.

    python examples/deepen.py mini runs/denoiser --denoiser 2

`--denoiser`: so many layers more behind those of the denoiser, copies of its first ones, whose outputs are zero likewise.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import new_folder, save_weights
from reelflow.adapters.hub import resolve
from reelflow.adapters.lora import flow_weights
from reelflow.config import FlowConfig
from reelflow.flow.rope import rotary

OUTPUTS = ("attention.proj.", "mlp.down.")
SHARPNESS = 8.0
"""By how much a pair of channels that turns once raises a score over its mean, at the place looked at."""


def deepen(weights: dict[str, Tensor], config: FlowConfig, after: Sequence[int], back: Sequence[int]) -> dict[str, Tensor]:
    """Weights with a new layer behind every layer 0 … of the deep block that `after` names, looking `back`."""
    layers = config.layers[-1]
    if not set(after) <= set(range(layers)):
        raise ValueError(f"--after {' '.join(map(str, after))}: the deep block has layers 0 … {layers - 1}")
    order = sorted([(index, False) for index in range(layers)] + [(index, True) for index in set(after)])
    found = {name: value for name, value in weights.items() if not name.startswith("deep_block.layers.")}
    for place, (index, new) in enumerate(order):
        prefix = f"deep_block.layers.{index}."
        layer = {name.removeprefix(prefix): value.clone() for name, value in weights.items() if name.startswith(prefix)}
        if new:
            layer |= silent(layer)
            layer = looking_back(layer, config, back) if back else layer
        found |= {f"deep_block.layers.{place}.{part}": value for part, value in layer.items()}
    return found


def silent(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer adds to what it reads, as zeros."""
    return {part: torch.zeros_like(value) for part, value in layer.items() if part.startswith(OUTPUTS)}


def deepen_denoiser(weights: dict[str, Tensor], layers: int, new: int) -> dict[str, Tensor]:
    """Weights with so many new layers behind the `layers` of the denoiser."""
    found = dict(weights)
    for index in range(layers, layers + new):  # copies of one and the same layer would learn the same
        prefix = f"denoiser.layers.{index % layers}."
        layer = {name.removeprefix(prefix): value.clone() for name, value in weights.items() if name.startswith(prefix)}
        found |= {f"denoiser.layers.{index}.{part}": value for part, value in (layer | silent(layer)).items()}
    return found


def looking_back(layer: dict[str, Tensor], config: FlowConfig, frames: Sequence[int]) -> dict[str, Tensor]:
    """A layer whose queries and keys say nothing but where they stand: its heads look in turn at the next token of the frame, and
    at the place below, as they were `frames` latent frames before. Inputs are one token late, so that the next one is this one.

    A turned pair of channels q = a and k = a · exp(−i ω Δ) has its highest score where the key stands Δ from the query. Pairs that turn
    too slowly for that have queries of zero but keep their keys: were both zero, neither would ever learn.
    """
    heads, dim = config.deep_width // config.head_dim, config.head_dim
    weight, bias = layer["attention.qkv.weight"].clone(), layer["attention.qkv.bias"].clone()
    weight[: heads * dim], bias[: heads * dim] = 0, 0
    key_weights = weight[heads * dim : 2 * heads * dim].view(heads, dim, -1)
    assert config.learned_places is not None
    unit = config.position_span / math.isqrt(config.learned_places)
    for head in range(heads):
        down, right = ((0.0, unit), (unit, 0.0))[head % 2]
        back = frames[head * len(frames) // heads]
        turn = rotary(torch.tensor([[down, right, -float(back)], [1.0, 1.0, 1.0]]), dim, third_axis=True).turn
        quick = turn[1].angle() >= 0.1
        channels, size = quick.repeat_interleave(2), (SHARPNESS * dim**0.5) ** 0.5
        query, key = bias[: 2 * heads * dim].view(2, heads, dim)[:, head]
        ahead = turn[0][quick]
        query[channels], key[channels] = (torch.view_as_real(size * pair).flatten() for pair in (torch.ones_like(ahead), ahead.conj()))
        key_weights[head, channels] = 0
    return layer | {"attention.qkv.weight": weight, "attention.qkv.bias": bias}


def coordinates(places: int, width: int, size: float) -> Tensor:
    """(places, width), random mixtures of row, column and their sines on a square frame, `size` the root mean square."""
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"--places {places} is not a square frame")
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1) - (side - 1) / 2
    turns = [math.pi * at * part / (2 * side) for part in (1, 2, 3, 4, 6, 8)]
    features = torch.cat([part for turn in turns for part in (turn.sin(), turn.cos())] + [at], 1)
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-3)
    features[:, -2:] *= 3
    mixed = features @ torch.randn(features.shape[1], width, generator=torch.Generator().manual_seed(0))
    return size * mixed / mixed.square().mean().sqrt()


def deeper(
    folder: Path, after: Sequence[int], back: Sequence[int], places: int | None, denoiser: int = 0
) -> tuple[dict[str, Tensor], FlowConfig]:
    """Weights and configuration of the flow in `folder`, changed. ValueError for layers or places that it cannot have."""
    config = FlowConfig.read(folder / "config.json")
    if denoiser and config.denoiser is None:
        raise ValueError(f"--denoiser {denoiser}: this model has no denoiser to deepen")
    embedded = {f"shallow_blocks.{index}": (config.width, 0.0) for index in range(len(config.layers) - 1)}
    embedded["deep_block"] = (config.deep_width, 0.15)
    config = config.model_copy(update={"learned_places": places or config.learned_places})
    if back and not after:
        raise ValueError("--back is where new layers look; --after says where they go")
    if back and (config.positions != "rotary" or not config.bias or config.num_heads or config.num_kv_heads or not config.learned_places):
        raise ValueError("--back is for rotary positions, layers with bias, as many key as query heads, and known places (--places)")
    weights = deepen(dict(flow_weights(folder)), config, after, back)
    if places:
        weights |= {f"{block}.pos_embed": coordinates(places, width, size) for block, (width, size) in embedded.items()}
    changed: dict[str, object] = {"layers": (*config.layers[:-1], config.layers[-1] + len(set(after)))}
    if config.denoiser and denoiser:
        weights = deepen_denoiser(weights, config.denoiser.layers, denoiser)
        changed["denoiser"] = config.denoiser.model_copy(update={"layers": config.denoiser.layers + denoiser})
    return weights, config.model_copy(update=changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="packaged name or folder")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--after", type=int, nargs="*", default=[], help="layers of the deep block, from 0, that get a new one behind them")
    parser.add_argument("--back", type=int, nargs="*", default=[], help="latent frames before, where new layers look at first")
    parser.add_argument("--places", type=int, help="tokens of a latent frame")
    parser.add_argument("--denoiser", type=int, choices=range(1, 65), metavar="LAYERS", default=0, help="layers more in the denoiser")
    options = parser.parse_args()
    try:
        source = resolve(options.model)
        weights, config = deeper(source / "transformer", options.after, options.back, options.places, options.denoiser)
        with new_folder(options.target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", "README.md", "train*.jsonl"))
            save_weights(weights, folder / "transformer")
            config.write(folder / "transformer" / "config.json")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""A larger network with the function of a small trained one: what it costs is that of its size, how it converges that of training.

    python benchmarks/grown.py runs/mini-60m --times 3      # mini with everything 3 times as wide, a folder for --model

Every unit of the small network stands f times in the large one. What reads f equal units has its weights divided among them,
unevenly by a random part that adds up to zero, so that no two units are alike and rounding acts on them as on others. Layers
beyond those of the small network read as its last one does and write nothing: their output weights are random and cancel over
equal units. Heads stay as they are, so attention is the same; LayerNorm, RMSNorm and GELU are the same on repeated units. In
exact arithmetic the two networks are one function; in float32 they differ by rounding.

The text keeps its positions only if there are as many text tokens; `spread` puts it where they are the same.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import load_into, new_folder, save_weights
from reelflow.adapters.hub import resolve
from reelflow.config import FlowConfig, ModelConfig
from reelflow.flow import StarFlow

UNEVEN = 0.1
"""The random part of divided weights, in units of the evenly divided ones."""


def times(config: FlowConfig, factor: int) -> FlowConfig:
    """Everything `factor` times as wide."""
    wider = {"width": config.width * factor, "deep_width": config.deep_width * factor}
    if config.denoiser:
        wider["denoiser"] = config.denoiser.model_copy(update={"width": config.denoiser.width * factor})
    return config.model_copy(update=wider)


@torch.no_grad()
def grow(
    small: StarFlow, config: FlowConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> StarFlow:
    """`small` with the widths, layers and text channels of `config`, the layers' products in `dtype`.

    Raises:
        ValueError: a size that is no multiple of the small network's.
    """
    assert {small.config.num_heads, small.config.num_kv_heads} == {None}, "heads are repeated with the width"
    state = {name: tensor.to(device) for name, tensor in small.state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        large = StarFlow(config).set_precision(dtype)
    found = {}
    for name, wanted in large.state_dict().items():
        source, new = _source(name, state)
        old = state[source].float()
        factors = [after // before for after, before in zip(wanted.shape, old.shape, strict=True)]
        if wanted.shape != torch.Size(factor * size for factor, size in zip(factors, old.shape, strict=True)):
            raise ValueError(f"{name}: {tuple(wanted.shape)} is no multiple of {tuple(old.shape)}; give multiples of every width")
        silent = new and name.rsplit(".", 1)[0].endswith(("attention.proj", "mlp.down"))
        found[name] = _enlarged(name, old, factors, silent, generator).to(wanted.dtype)
    load_into(large, found, device, "declared")
    return large.eval().requires_grad_(False)


def _source(name: str, state: dict[str, Tensor]) -> tuple[str, bool]:
    """The tensor of the small network that `name` is made from, and whether its layer is a new one."""
    if name in state:
        return name, False
    match = re.fullmatch(r"(.*layers)\.\d+\.(.*)", name)
    if not match:
        raise ValueError(f"{name}: not in the small network")
    before, after = match.groups()
    last = max(int(key[len(before) + 1 :].split(".")[0]) for key in state if key.startswith(f"{before}."))
    return f"{before}.{last}.{after}", True


def _enlarged(name: str, old: Tensor, factors: list[int], silent: bool, generator: torch.Generator) -> Tensor:
    """Rows repeated, columns divided (of an embedding, whose columns are units: repeated); `silent`: what it writes is nothing."""
    if name.endswith(".pos_embed"):
        return old.repeat(*factors)
    groups = 3 if ".qkv." in name else 1  # queries, keys and values are repeated each by itself
    rows = torch.cat([part.repeat(factors[0], *[1] * (old.ndim - 1)) for part in old.chunk(groups)])
    if old.ndim != 2:
        return torch.zeros_like(rows) if silent else rows
    copies, pairs = factors[1], factors[1] // 2
    noise = torch.randn(len(rows), pairs, rows.shape[1], generator=generator, device=rows.device) * (rows.std() / copies)
    cancelling = torch.zeros(len(rows), copies, rows.shape[1], device=rows.device)
    cancelling[:, : 2 * pairs : 2], cancelling[:, 1 : 2 * pairs : 2] = noise, -noise
    return cancelling.flatten(1) if silent else (rows / copies).repeat(1, copies) + UNEVEN * cancelling.flatten(1)


def spread(states_BLE: Tensor, tokens: int, channels: int) -> Tensor:
    """Text states for a network grown to more text tokens and channels, (B, tokens, channels): the channels repeated, every
    token at the place whose position is its own, zeros (as of padding) in between.
    """
    batch, length, width = states_BLE.shape
    found = states_BLE.new_zeros(batch, tokens, channels)
    found[:, torch.arange(length) * tokens // length] = states_BLE.repeat(1, 1, channels // width)
    return found


def flow_of(folder: Path) -> StarFlow:
    """The flow of a model folder, in float32, on the CPU."""
    with torch.device("meta"):
        flow = StarFlow(FlowConfig.read(folder / "transformer" / "config.json"))
    load_into(flow, folder / "transformer", "cpu", torch.float32)
    return flow.eval().requires_grad_(False)


def write(output: Path, model: str = "mini", factor: int = 3) -> int:
    """A model folder of everything `factor` times as wide; how many parameters its flow has."""
    source = resolve(model)
    small, about = flow_of(source), ModelConfig.read(source / "config.json")
    large = grow(small, times(small.config, factor))
    with new_folder(output) as folder:
        for part in ("vae", "text_encoder", "tokenizer"):
            shutil.copytree(source / part, folder / part)
        save_weights(large.state_dict(), folder / "transformer")
        large.config.write(folder / "transformer" / "config.json")
        about.model_copy(update={"name": output.name}).write(folder / "config.json")
    return sum(weight.numel() for weight in large.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="A model folder of a small model's function in a wider network.")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--model", default="mini", help="packaged name or folder of the small model (default: mini)")
    parser.add_argument("--times", type=int, default=3, help="how much wider, from 1 (default: 3, which makes 60 M parameters of mini)")
    options = parser.parse_args()
    try:
        print(f"{options.output}: {write(options.output, options.model, options.times) / 1e6:.1f} M parameters")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

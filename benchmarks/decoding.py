"""Decoding latents: this project's passes through Wan's VAE against diffusers' own, same weights, same latents, in turns.

    python benchmarks/decoding.py [--repeats 5] [--json]

Measured: mini's codec, trained, and the shape of Wan 2.2's at full width with random weights; `seconds` of one clip, each the median,
`times` the median of the ratios of single rounds, `error` the largest difference of a pixel in units of 1/255.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from rig import FULL, VAE
from torch import Tensor, nn

from reelflow.adapters.hub import resolve
from reelflow.adapters.vae import VideoCodec, load_codec

COLUMNS = ("codec", "precision", "frames", "diffusers", "ours", "times as fast", "largest difference")


def mini() -> Any:
    return load_codec(resolve("mini") / "vae", 1.0).vae


def full() -> Any:
    torch.manual_seed(0)
    return AutoencoderKLWan(**VAE | FULL.vae).eval()


CASES: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {"mini's": (mini, (9, 8, 8)), "Wan 2.2's shape": (full, (3, 5, 8))}
"""How to come by the VAE, and latents (frames, height, width)."""


@torch.no_grad()
def measure(name: str, precision: str, repeats: int) -> dict[str, Any]:
    make, shape = CASES[name]
    vae = nn.Module.to(make(), getattr(torch, precision))  # past the library's own, which has something to say
    theirs, codec = nn.Module.to(deepcopy(vae), memory_format=torch.contiguous_format), VideoCodec(vae)
    latents = torch.randn(1, shape[0], codec.channels, *shape[1:], generator=torch.Generator().manual_seed(0))
    raw = (latents * codec.std_C11 + codec.mean_C11).transpose(1, 2).to(vae.dtype)

    def ours() -> Tensor:
        return torch.cat([*codec.decode_pixels(latents.unbind(1))], 2) - 1

    def diffusers() -> Tensor:
        return theirs.decode(raw).sample.float()

    spent: dict[Callable[[], Tensor], list[float]] = {ours: [], diffusers: []}
    for round_ in range(repeats + 1):
        for run, times in spent.items():
            began = time.perf_counter()
            run()
            times += [time.perf_counter() - began] * (round_ > 0)  # the first round warms up
    error = (ours() - diffusers()).abs().max().item() * 127.5
    return {
        "codec": name, "precision": precision, "frames": 1 + 4 * (shape[0] - 1), "height": 16 * shape[1], "width": 16 * shape[2],
        "diffusers": statistics.median(spent[diffusers]), "ours": statistics.median(spent[ours]),
        "times": statistics.median(theirs / own for own, theirs in zip(*spent.values(), strict=True)), "error": error,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    size = f"{row['frames']} of {row['width']} × {row['height']}"
    seconds = (f"{row[whose]:.3g} s" for whose in ("diffusers", "ours"))
    return (row["codec"], row["precision"], size, *seconds, f"{row['times']:.2f}", f"{row['error']:.2g} / 255")


def run(repeats: int) -> list[dict[str, Any]]:
    return [measure(name, precision, repeats) for name in CASES for precision in ("float32", "bfloat16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts (default: 5)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    rows = run(options.repeats)
    if options.json:
        print(json.dumps(rows))
    else:
        for line in (COLUMNS, *map(cells, rows)):
            print("  ".join(word.rjust(20) for word in line))


if __name__ == "__main__":
    main()

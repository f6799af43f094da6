"""How much of a flow's gradient is noise, and what opposite data noise (`antithetic`) takes away of it, for the same work.

    python benchmarks/gradient_noise.py [--model mini] [--batches 6] [--clips 8]

True toybox clips with fresh data noise; g, the gradient of the mean likelihood of a batch in all weights of the deep block. Signal is the
mean of g · g' of batches that share no clip, the square of the true gradient; noise the mean of g · g less that: their ratio says how
many such batches it takes until their mean is as much gradient as noise.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from reelflow.data.scene import Scene
from reelflow.data.toybox import canonical, render
from reelflow.evaluation.toybox import scenes
from reelflow.pipelines import load
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.training.loss import nll


def gradient(pipe: StarFlowPipeline, x_BFChw: Tensor, some: list[Scene]) -> Tensor:
    """Of the mean likelihood, in all weights of the deep block, flat."""
    weights = list(pipe.flow.deep_block.parameters())
    with torch.no_grad():
        states = pipe.prompting.states([canonical(scene) for scene in some], "1:1", image=False)
    with torch.enable_grad():
        found = torch.autograd.grad(nll(pipe.flow, x_BFChw, states).mean(), weights)
    return torch.cat([each.flatten().float() for each in found])


def products(one: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Mean product of the gradients of the same batch, and of different batches."""
    table = torch.stack(one) @ torch.stack(other).T
    same, count = float(table.diagonal().sum()), len(one)
    return same / count, (float(table.sum()) - same) / (count * (count - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="packaged name or folder (default: mini)")
    parser.add_argument("--batches", type=int, default=6, help="from 2 (default: 6)")
    parser.add_argument("--clips", type=int, default=8, help="of a batch (default: 8)")
    options = parser.parse_args()
    pipe = load(options.model)
    assert isinstance(pipe, StarFlowPipeline)
    pipe.flow.requires_grad_(True)
    drawn, generator = scenes(options.batches * options.clips, "train", 1), torch.Generator().manual_seed(0)
    first, opposite, other = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch in range(options.batches):
        some = drawn[batch * options.clips : (batch + 1) * options.clips]
        clean = torch.cat([pipe.codec.encode(render([scene])) for scene in some]).clone()
        one, two = (pipe.flow.config.noise_std * torch.randn(clean.shape, generator=generator) for _ in range(2))
        for kind, noise in ((first, one), (opposite, -one), (other, two)):
            kind.append(gradient(pipe, clean + noise, some))
    signal = products([sum(found) for found in zip(first, opposite, other, strict=True)], first)[1] / 3
    squares = sum(products(kind, kind)[0] for kind in (first, opposite, other)) / 3
    rows, clips = 2 * options.clips, options.clips
    print(f"noise by signal of the gradient of {clips} clips: {(squares - signal) / signal:.1f}; of {rows} rows,")
    for name, beside in ((f"{rows} clips", signal), (f"{clips} clips with two noises each", products(first, other)[0]),
                         (f"{clips} clips with opposite noises", products(first, opposite)[0])):  # fmt: skip
        print(f"    {name}: {((squares + beside) / 2 - signal) / signal:.1f}")


if __name__ == "__main__":
    main()

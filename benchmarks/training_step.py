"""What a training step costs on a CPU, with and without what makes it cheaper: mini's flow and mini-svd's UNet, a process each.

    python benchmarks/training_step.py [--steps 8]

Memory that a step has freed is kept for the next one (`training.allocator`), causal attention goes in tiles (`training.attention`).
Seconds of a step (median), and processor seconds a step in the program and in the kernel, which clears the pages of memory that is
handed out anew. One thread, random batches of 8 clips.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import reelflow
from reelflow.adapters.svd import load_part
from reelflow.training.allocator import keep_freed_memory
from reelflow.training.attention import attend_quickly
from reelflow.training.loss import nll
from reelflow.training.parallel import layers
from reelflow.training.svd.blocks import activation
from reelflow.training.svd.unet import velocity

WEIGHTS = Path(reelflow.__file__).parent / "weights"


def flow(tiles: bool = False) -> Callable[[], torch.Tensor]:
    model = reelflow.load("mini", "cpu").flow.float().train().requires_grad_(True)
    for layer in layers(model) if tiles else ():
        attend_quickly(layer)
    x, text = torch.randn(8, 9, 48, 8, 8), torch.randn(8, model.config.text_tokens, model.config.text_dim)
    return lambda: nll(model, x, text).mean()


def unet() -> Callable[[], torch.Tensor]:
    model = load_part(WEIGHTS / "mini-svd" / "unet", "unet").train().requires_grad_(True)
    x, states, ids = torch.randn(8, 14, 32, 8, 8), torch.randn(8, 64), torch.tensor([[11.0, 100.0, 0.05]]).expand(8, 3)
    activate = activation()
    return lambda: velocity(model, x, torch.zeros(8), states, ids, activate).float().square().mean()


def one_step(loss: Callable[[], torch.Tensor]) -> None:
    """What it holds is let go at its end, as in the trainer."""
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
    value.backward()


KINDS: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {"flow": flow, "flow, tiles": partial(flow, tiles=True), "unet": unet}


def measured(kind: str, keep: bool, steps: int) -> dict[str, float]:
    """Of this process."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    loss, taken = KINDS[kind](), []
    for step in range(steps + 2):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        one_step(loss)
        taken.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = {"program": after.ru_utime - before.ru_utime, "kernel": after.ru_stime - before.ru_stime}
    return {"step": statistics.median(taken[2:])} | {name: seconds / steps for name, seconds in used.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "KEEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one[0], options.one[1] == "kept", options.steps)))
        return
    print(f"{'':32}{'seconds a step':>16}{'in the program':>16}{'in the kernel':>16}")
    for kind in KINDS:
        for keep in ("given back", "kept"):
            command = [sys.executable, __file__, "--steps", str(options.steps), "--one", kind, keep]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            print(f"{kind + ', memory ' + keep:32}" + "".join(f"{found[key]:16.3f}" for key in ("step", "program", "kernel")))


if __name__ == "__main__":
    main()

"""Clips of toybox per second on one thread: `python benchmarks/toybox.py [--device cpu] [--clips 128]`."""

from __future__ import annotations

import argparse
import time

import torch

from reelflow.data.toybox import render, sample_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="where to draw (default: cpu)")
    parser.add_argument("--clips", type=int, default=128, help="clips to render, from 1 (default: 128)")
    parser.add_argument("--batch", type=int, default=16, help="clips rendered together, from 1 (default: 16)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    scenes = [sample_scene(0, index) for index in range(options.clips)]
    print(f"sample_scene: {options.clips / (time.process_time() - started):,.0f} scenes/s")
    for size in (64, 128):
        render(scenes[: options.batch], size=size, device=options.device)  # warm up
        wall, busy = time.perf_counter(), time.process_time()
        for first in range(0, options.clips, options.batch):
            batch = render(scenes[first : first + options.batch], size=size, device=options.device)
        batch[-1, -1, -1, -1].tolist()  # wait for the device
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        print(f"render {size} x {size} x 33: {options.clips / wall:,.0f} clips/s ({options.clips / busy:,.0f} per second of CPU time)")


if __name__ == "__main__":
    main()

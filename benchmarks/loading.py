"""How fast clips are looked at and decoded for training, by number of threads.

    python benchmarks/loading.py [--clips 16] [--height 720] [--seconds 4] [--json]

Toybox clips are written as H.264 at 30 frames per second, then brought to what STARFlow-V sees: 81 frames at 16 per second, or as
many as there are, at the 640² size of their aspect. Reported: milliseconds of processor time to probe a clip, and per frame that
comes out; frames per second with 1, 2 and 4 threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from reelflow.clip import Clip
from reelflow.data.ahead import ahead
from reelflow.data.decode import View
from reelflow.data.source import Sample
from reelflow.data.toybox import render, sample_scene
from reelflow.media.aspect import ASPECTS


def written(folder: Path, count: int, height: int, seconds: float) -> list[Sample]:
    """Clips of 16:9, a scene at the middle of each."""
    samples = []
    for index in range(count):
        square = render([sample_scene(0, index)], round(seconds * 30), height)[0].numpy()
        side = (height * 16 // 9 - height) // 2 // 2 * 2
        path = folder / f"{index}.mp4"
        Clip(np.pad(square, ((0, 0), (0, 0), (side, side), (0, 0)), mode="edge"), 30).save(path)
        samples.append(Sample(path.name, path, ("a clip",)))
    return samples


def measure(samples: list[Sample]) -> dict[str, float]:
    view = View(fps=16, side=640, unit=16, step=4, aspects=ASPECTS, random_crop=False, seed=0)
    began = time.process_time()
    measures = [view.measure(sample) for sample in samples]
    found = {"probe_cpu_ms": 1000 * (time.process_time() - began) / len(samples)}
    pairs = list(zip(samples, measures, strict=True))
    for threads in (1, 2, 4):
        began, cpu = time.perf_counter(), time.process_time()
        frames = sum(piece.frames.shape[1] for piece in ahead(lambda pair: view.take(*pair, 81, 1, 0), pairs, threads, 2 * threads))
        found[f"frames_per_second_{threads}_threads"] = frames / (time.perf_counter() - began)
        found["frame_cpu_ms"] = 1000 * (time.process_time() - cpu) / frames
    return {key: round(value, 1) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, help="how many (default %(default)s)")
    parser.add_argument("--height", type=int, default=720, help="pixels (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(written(Path(folder), o.clips, o.height, o.seconds))
    print(json.dumps(found) if o.json else "\n".join(f"{key:>28} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()

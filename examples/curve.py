"""The curve of a training run as a picture: bits per dimension (flows) or loss (svd), of each log step and as a running mean.

    python examples/curve.py docs/mini-training.png src/reelflow/weights/mini/train.jsonl src/reelflow/weights/mini/train2.jsonl

Several logs are runs one after the other. Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

WINDOW = 15
"""Log steps of the running mean."""


def main(target: str, *logs: str) -> None:
    figure = Figure((8, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    begun, lowest, highest = 0, np.inf, -np.inf
    for number, log in enumerate(logs):
        lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        what = "bits_per_dim" if "bits_per_dim" in lines[0] else "loss"
        steps, values = (np.array([line[name] for line in lines]) for name in ("step", what))
        mean = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
        colour = f"C{number}"
        axes.plot(begun + steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(begun + steps[WINDOW // 2 :][: len(mean)], mean, color=colour, label=Path(log).name)
        axes.set_ylabel(what.replace("_", " "))
        begun, lowest, highest = begun + int(steps[-1]), min(lowest, values.min()), max(highest, mean[len(mean) // 10])
    axes.set_ylim(lowest, highest)  # the first steps fall from far above
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])

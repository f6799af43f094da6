"""The curve of a training run as a picture: bits per dimension (flows) or loss (svd), of each log step and as a running mean.

    python examples/curve.py docs/mini-training.png src/reelflow/weights/mini/train*.jsonl

Every log has a panel and a scale of its own: bits at another data noise are another quantity. Needs matplotlib.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

WINDOW = 15
"""Log steps of the running mean."""

COLUMNS = 4
"""Panels beside one another, at most."""


def main(target: str, *logs: str) -> None:
    rows, columns = math.ceil(len(logs) / COLUMNS), min(len(logs), COLUMNS)
    figure = Figure((8, 0.5 + 2.5 * rows), dpi=100, layout="constrained")
    for index, log in enumerate(logs):
        axes = figure.add_subplot(rows, columns, index + 1)
        lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        what = "bits_per_dim" if "bits_per_dim" in lines[0] else "loss"
        steps, values = (np.array([line[name] for line in lines]) for name in ("step", what))
        mean = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps[WINDOW // 2 :][: len(mean)], mean, color="C0")
        axes.set_ylim(values.min(), mean[len(mean) // 10 :].max())  # the first steps fall from far above
        axes.set_title(Path(log).name, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel(what.replace("_", " "))
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])

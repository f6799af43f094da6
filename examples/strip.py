"""The picture in the README: one row of frames per task, all made by the shipped model with fixed seeds.

    python examples/strip.py docs/mini.png
"""

import sys

import numpy as np
from PIL import Image

import reelflow

PROMPTS = (
    "a large red ball moves right on a black background",
    "a large blue box moves left on a grey background",
    "a large green star moves down on a navy background",
    "a large yellow triangle moves up on a brown background",
)
COLUMNS = 9


def row(clip: reelflow.Clip) -> np.ndarray:
    """Evenly spaced frames side by side."""
    return np.concatenate([clip.frames[round(k)] for k in np.linspace(0, len(clip) - 1, COLUMNS)], 1)


def main(target: str) -> None:
    pipe = reelflow.load("mini")
    clips = [pipe.generate(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    clips.append(pipe.edit(clips[0], "make the ball cyan", seed=0))
    clips.append(pipe.extend(clips[1], PROMPTS[1], seconds=4, seed=0))
    Image.fromarray(np.concatenate([row(clip) for clip in clips])).save(target)


if __name__ == "__main__":
    main(sys.argv[1])

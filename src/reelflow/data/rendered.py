"""toybox as a source: clips, pictures of other scenes, and edits."""

from __future__ import annotations

from collections.abc import Iterator

from reelflow.data.config import ToyboxData
from reelflow.data.source import PART, Part, Sample
from reelflow.data.toybox import captions, edit_pair, sample_scene


class Rendered:
    """The scenes follow from (seed, kind, number of frames, index) alone; nothing is rendered here.

    Args:
        frames: of a clip.
        edit_frames: of each clip of an edit.
    """

    lasting = True

    def __init__(self, config: ToyboxData, frames: int, edit_frames: int):
        self.config, self.seed = config, config.seed
        wanted = {"clips": (frames, config.count), "pictures": (1, config.pictures), "edits": (edit_frames, config.edits)}
        self._parts = [
            (kind, length, range(start, min(start + PART, count)))
            for kind, (length, count) in wanted.items() for start in range(0, count, PART)
        ]  # fmt: skip
        if not self._parts:
            raise ValueError("toybox: count, pictures and edits are all 0; ask for some")

    def parts(self) -> list[Part]:
        changed = self.config.model_dump(exclude_defaults=True, include={"pairs", "motions"})
        own = "".join(f", {name} {value}" for name, value in changed.items())
        return [
            Part(f"toybox {kind} {some.start} to {some.stop - 1}, {length} frames, seed {self.seed}{own}", len(some))
            for kind, length, some in self._parts
        ]

    def samples(self, part: int) -> Iterator[Sample]:
        kind, length, indices = self._parts[part]
        for index in indices:
            key = f"toybox/{kind}/{index}"
            if kind == "edits":
                before, after, words = edit_pair(self.seed, index)
                yield Sample(key, after, (words,), before, length)
            else:
                # pictures show other scenes than clips
                scene = sample_scene(self.seed + 1000 * length, index, pairs=self.config.pairs, motions=self.config.motions)
                yield Sample(key, scene, captions(scene), frames=length)


"""Toybox: the endless rendered world that the small models know. Scenes with words, edit pairs, impossible twins, dataset.

>>> scene = sample_scene(seed=0, index=7)
>>> captions(scene)[0]
'a large red box circles on a grey background'
>>> render([scene]).shape
torch.Size([1, 33, 128, 128, 3])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from reelflow.data.render import render, simulate
from reelflow.data.scene import (
    BACKGROUNDS,
    CLIP,
    COLOURS,
    FPS,
    FRAME,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    SIZES,
    Look,
    Scene,
    Split,
    Thing,
    Twist,
    Wall,
    generator,
    new_wall,
    place_things,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS", "CLIP", "COLOURS", "FPS", "HELD_OUT", "MOTIONS", "SHAPES", "SIZES", "Scene", "Split", "Thing", "Toybox", "Twist", "Wall",
    "canonical", "captions", "collate", "edit_pair", "impossible_twin", "render", "sample_scene", "scene_from_prompt", "simulate",
]  # fmt: skip

_DOING = {
    "moves left": ("is moving to the left", "travels left", "slides to the left"),
    "moves right": ("is moving to the right", "travels right", "slides to the right"),
    "moves up": ("is moving up", "travels upwards", "rises"),
    "moves down": ("is moving down", "travels downwards", "sinks"),
    "stays still": ("does not move", "is at rest", "stays where it is"),
    "bounces": ("is bouncing", "bounces on the floor", "jumps up and down"),
    "circles": ("is circling", "goes round in a circle", "moves in a circle"),
}

_WALL = ", with a grey wall in front"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _wall(scene: Scene) -> str:
    return "" if scene.wall is None else _WALL


def canonical(scene: Scene, sizes: bool = True) -> str:
    """The caption in the grammar that `scene_from_prompt` reads, with or without the sizes."""
    parts = [f"{_a(f'{thing.size} ' * sizes + f'{thing.colour} {thing.shape}')} {thing.motion}" for thing in scene.things]
    return f"{' and '.join(parts)} on a {scene.background} background{_wall(scene)}"


def captions(scene: Scene) -> tuple[str, ...]:
    """True captions in several phrasings; first the canonical one with sizes, second the canonical one without.

    All of them say whether there is a wall: else a model would put walls into scenes that nobody asked for them in.
    """
    things, ground = scene.things, scene.background
    full = [f"{thing.size} {thing.colour} {thing.shape}" for thing in things]
    plain = [f"{thing.colour} {thing.shape}" for thing in things]
    doing = list(zip(*(_DOING[thing.motion] for thing in things), strict=True))

    def say(nouns: list[str], verbs: Sequence[str]) -> str:
        return " and ".join(f"{_a(noun)} {verb}" for noun, verb in zip(nouns, verbs, strict=True))

    found = [
        f"{say(plain, doing[0])} on a {ground} background",
        f"on a {ground} background, {say(full, doing[1])}",
        f"{say(plain, doing[2])} in front of a {ground} background",
        f"{say(full, doing[2])}, {ground} background",
        f"a {ground} scene in which {say(plain, [thing.motion for thing in things])}",
    ]
    for thing, noun in zip(things, plain, strict=True):
        if thing.turn and len(things) == 1:
            way = "clockwise" if thing.turn > 0 else "counter-clockwise"
            found.append(f"{_a(noun)} circles {way} on a {ground} background")
    return canonical(scene), canonical(scene, sizes=False), *(caption + _wall(scene) for caption in found)


_PROMPT = re.compile(rf"(?P<things>.+) on an? (?P<background>\w+) background(?P<wall>{_WALL})?")


def scene_from_prompt(prompt: str, seed: int) -> Scene:
    """The scene that a canonical prompt describes; size, where not named, places and speeds come from `seed`.

    Grammar: `a [size] colour shape motion [and a [size] colour shape motion] on a background background[, with a grey wall in front]`.
    ValueError names the word that toybox does not know.
    """
    rng = generator(seed, 0, "prompt")
    whole = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if whole is None:
        raise ValueError(f"prompt {prompt!r} does not end in 'on a {'|'.join(BACKGROUNDS)} background'")
    looks: list[Look] = []
    for part in whole["things"].split(" and "):
        words = part.split()
        said = 2 if words[-2:-1] in (["moves"], ["stays"]) else 1  # words of the motion
        article, *look = words[:-said] or [""]
        if article not in ("a", "an") or len(look) not in (2, 3):
            raise ValueError(f"{part!r} is not of the form 'a [size] colour shape motion', as in 'a small red ball moves right'")
        size = look[0] if len(look) == 3 else str(rng.choice(list(SIZES)))
        looks.append((look[-1], look[-2], size, " ".join(words[-said:])))
    if len(looks) > 2:
        raise ValueError(f"{len(looks)} things in {prompt!r}: toybox knows scenes of one or two")
    for look in looks:  # an unknown word is reported by Thing and Scene, before room is sought
        Thing(*look, 0, 0, turn=float(look[3] == "circles"))
    scene = Scene(place_things(rng, looks), whole["background"], gradient=float(rng.uniform(-15, 15)) if rng.random() < 0.5 else 0.0)
    return replace(scene, wall=new_wall(rng)) if whole["wall"] else scene


def edit_pair(seed: int, index: int, *, split: Split = "train") -> tuple[Scene, Scene, str]:
    """Scene before, scene after, and the instruction between them; over a clip the things move exactly alike.

    Kinds: "make the ball blue", "turn the box into a star", "make the background navy", "make the ball small". With two
    things of one shape the colour tells which: "make the red ball blue". `split` holds for the scene after; with "train"
    neither scene shows a held-out pair.
    """
    rng = generator(seed, index, "edit")
    after = sample_scene(int(rng.integers(2**63)), index, split=split)
    for kind in rng.permutation(["colour", "shape", "size", "background"]):
        options = [before for before in _variants(after, str(kind)) if split != "train" or not before.held_out]
        if options:
            before, place = options[rng.integers(len(options))], 0
            if kind == "background":
                return before, after, f"make the background {after.background}"
            while before.things[place] == after.things[place]:
                place += 1
            old, new = before.things[place], after.things[place]
            twins = [thing.shape for thing in before.things].count(old.shape) > 1
            noun = f"{old.colour} {old.shape}" if twins else old.shape
            change = f"turn the {noun} into {_a(new.shape)}" if kind == "shape" else f"make the {noun} {getattr(new, str(kind))}"
            return before, after, change
    raise AssertionError("every scene has another background")


def _variants(scene: Scene, kind: str) -> list[Scene]:
    """All scenes with one other value of `kind`, with the same paths over a clip."""
    if kind == "background":
        return [replace(scene, background=name) for name in BACKGROUNDS if name != scene.background]
    values: Sequence[str] = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}[kind]
    taken = {getattr(thing, kind) for thing in scene.things} if kind == "colour" else set()
    found = []
    for place, thing in enumerate(scene.things):
        for value in values:
            if value == getattr(thing, kind) or value in taken:
                continue
            other = scene.with_thing(place, **{kind: value})
            if kind != "size" or _same_paths(scene, other):
                found.append(other)
    return found


def _same_paths(scene: Scene, other: Scene) -> bool:
    """True if over a clip the things are at the same places in both, inside the frame and clear of each other."""
    paths = simulate(scene)
    reach = np.array([thing.radius for thing in other.things])
    inside = np.all((paths >= reach[:, None]) & (paths <= FRAME - reach[:, None]))
    apart = len(reach) == 1 or np.hypot(*(paths[:, 0] - paths[:, 1]).T).min() > reach.sum()
    return bool(inside and apart and np.array_equal(paths, simulate(other)))


def impossible_twin(scene: Scene, seed: int) -> Scene:
    """The same scene until a moment in the middle third of a clip (frames 11 to 21), then something that cannot be.

    A thing vanishes, jumps by at least its own width, or changes colour; two things that would touch then may pass
    through each other instead. ValueError for a scene that is impossible already.
    """
    if scene.twist is not None:
        raise ValueError(f"the scene has a twist already: {scene.twist}")
    rng = generator(seed, 0, "twin")
    moment, place = int(rng.integers(CLIP // 3, 2 * CLIP // 3)), int(rng.integers(len(scene.things)))
    kinds = ["vanish", "jump", "colour"]
    if len(scene.things) == 2:
        through = replace(scene, twist=Twist("pass", CLIP // 3))
        if np.abs(simulate(scene, 2 * CLIP // 3) - simulate(through, 2 * CLIP // 3)).max() > 2:
            kinds += ["pass"] * 3  # as often as all others together: few scenes allow it
    kind = str(rng.choice(kinds))
    if kind == "pass":
        return through
    if kind == "colour":
        colours = [name for name in COLOURS if all(name != thing.colour for thing in scene.things)]
        return replace(scene, twist=Twist("colour", moment, place, colour=str(rng.choice(colours))))
    if kind == "jump" and (spot := _landing(scene, place, moment, rng)) is not None:
        return replace(scene, twist=Twist("jump", moment, place, *spot))
    return replace(scene, twist=Twist("vanish", moment, place))


def _landing(scene: Scene, place: int, moment: int, rng: np.random.Generator) -> tuple[float, float] | None:
    """A free spot at least 38 pixels from where the thing is at `moment`; None if there is none."""
    thing = scene.things[place]
    now = simulate(scene, moment + 1)[moment]
    if thing.turn:
        centre_x, centre_y, _ = thing.orbit
        return float(2 * centre_x - now[place, 0]), float(2 * centre_y - now[place, 1])
    for _ in range(100):
        x, y = rng.uniform(thing.radius, FRAME - thing.radius, 2)
        if thing.motion == "bounces":  # keeps its height, so that it bounces as high as before
            y = now[place, 1]
        spot = np.array([x, y])
        clear = len(now) == 1 or np.hypot(*(spot - now[1 - place])) > sum(other.radius for other in scene.things) + 2
        if clear and np.hypot(*(spot - now[place])) >= 2 * SIZES["large"]:
            return float(x), float(y)
    return None


class Toybox(torch.utils.data.Dataset[dict[str, Any]]):
    """Endless clips, each from (seed, index) alone. A sample: `frames` uint8 (F, size, size, 3), `caption`, `scene`.

    Half of the captions are canonical (with and without sizes), the other half any other phrasing. `length` only tells
    samplers where to stop; every index from 0 works. Use `collate` as the DataLoader's `collate_fn`.
    """

    def __init__(self, seed: int = 0, frames: int = CLIP, size: int = 128, split: Split = "train", length: int = 1_000_000) -> None:
        self.seed, self.frames, self.size, self.split, self.length = seed, frames, size, split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples, rendered together."""
        scenes = [sample_scene(self.seed, index, split=self.split) for index in indices]
        frames = render(scenes, self.frames, self.size)
        samples = zip(indices, scenes, frames, strict=True)
        return [{"frames": clip, "caption": self._caption(index, scene), "scene": scene} for index, scene, clip in samples]

    def _caption(self, index: int, scene: Scene) -> str:
        rng = generator(self.seed, index, "caption")
        phrasings = captions(scene)
        return phrasings[rng.integers(2)] if rng.random() < 0.5 else phrasings[rng.integers(2, len(phrasings))]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch of samples: `frames` stacked to (N, F, H, W, 3), `caption` and `scene` as lists."""
    return {
        "frames": torch.stack([sample["frames"] for sample in samples]),
        "caption": [sample["caption"] for sample in samples],
        "scene": [sample["scene"] for sample in samples],
    }

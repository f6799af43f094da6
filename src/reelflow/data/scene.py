"""What can be in a toybox clip: palette, the machine-readable scene, and where a scene puts its things.

Units: lengths in pixels of a 128 x 128 frame, times in frames (16 per second), x to the right, y downwards, the
frame spans 0..128 in both. Things are drawn in order, later ones in front, the wall in front of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

FRAME = 128.0
CLIP = 33
FPS = 16
GRAVITY = 0.5
WALL_COLOUR = (160, 160, 160)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 50),
    "green": (50, 180, 70),
    "cyan": (60, 200, 220),
    "blue": (50, 80, 220),
    "purple": (150, 60, 200),
    "white": (240, 240, 240),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (10, 10, 10), "grey": (90, 90, 90), "navy": (20, 25, 60), "brown": (70, 50, 35)}
SHAPES = ("ball", "box", "triangle", "star")
SIZES: dict[str, float] = {"small": 11.0, "large": 19.0}
DIRECTIONS: dict[str, tuple[int, int]] = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
MOTIONS = (*DIRECTIONS, "stays still", "bounces", "circles")
HELD_OUT = frozenset({("cyan", "star"), ("purple", "box"), ("orange", "triangle"), ("white", "ball")})

Split = Literal["train", "held_out", "any"]
Look = tuple[str, str, str, str]  # shape, colour, size, motion

# Independent random streams of one (seed, index); the number goes into the counter of the generator.
STREAMS = {"scene": 0, "caption": 1, "edit": 2, "twin": 3, "prompt": 4}


@dataclass(frozen=True)
class Thing:
    """One object: what it looks like, what it does, and its state at frame 0.

    `x, y` in pixels, `vx, vy` in pixels per frame; `turn` in radians per frame is non-zero only for "circles", where
    the velocity is turned by it every frame (positive: clockwise on screen).
    """

    shape: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    turn: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
            ("size", self.size, SIZES),
            ("motion", self.motion, MOTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not in toybox; use one of: {', '.join(known)}")
        if (self.turn != 0) != (self.motion == "circles"):
            raise ValueError(f"turn {self.turn!r} with motion {self.motion!r}: a thing turns if and only if it circles")

    @property
    def radius(self) -> float:
        """Distance at which it touches the frame's edge or another thing, in pixels of 128."""
        return SIZES[self.size]

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def moves(self) -> bool:
        """True for the four straight motions: the things that others can deflect."""
        return self.motion in DIRECTIONS

    @property
    def orbit(self) -> tuple[float, float, float]:
        """Centre x, centre y and radius of the circle it runs on; only for "circles"."""
        return self.x - self.vy / self.turn, self.y + self.vx / self.turn, float(np.hypot(self.vx, self.vy)) / abs(self.turn)


@dataclass(frozen=True)
class Wall:
    """A grey bar from top to bottom in front of everything; centre `x` and `width` in pixels."""

    x: float
    width: float


@dataclass(frozen=True)
class Twist:
    """What makes a scene impossible, from frame `frame` on.

    "vanish": thing `thing` is gone; "jump": it is at (`x`, `y`) at once; "colour": it is `colour` at once; "pass": things
    pass through each other.
    """

    kind: Literal["vanish", "jump", "colour", "pass"]
    frame: int
    thing: int = 0
    x: float = 0.0
    y: float = 0.0
    colour: str = ""


@dataclass(frozen=True)
class Scene:
    """All that a clip shows. `gradient` in -15..15: the background's lower edge is brighter by it, the upper edge darker."""

    things: tuple[Thing, ...]
    background: str
    gradient: float = 0.0
    wall: Wall | None = None
    twist: Twist | None = None

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r} is not in toybox; use one of: {', '.join(BACKGROUNDS)}")
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"{len(self.things)} things: a scene has one or two")

    @property
    def held_out(self) -> bool:
        """True if it shows a (colour, shape) pair that training never shows."""
        return any(thing.pair in HELD_OUT for thing in self.things)

    def with_thing(self, place: int, **changes: Any) -> Scene:
        """The scene with fields of one thing replaced."""
        things = list(self.things)
        things[place] = replace(things[place], **changes)
        return replace(self, things=tuple(things))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        return {**asdict(self), "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scene:
        """Inverse of `to_dict`; ValueError for values that toybox does not have, TypeError for fields it does not have."""
        return cls(
            **{
                **data,
                "things": tuple(Thing(**thing) for thing in data["things"]),
                "wall": Wall(**data["wall"]) if data.get("wall") else None,
                "twist": Twist(**data["twist"]) if data.get("twist") else None,
            }
        )


def generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """Random numbers that depend on (seed, index, stream) alone: a counter-based generator, so order does not matter."""
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} {value} is outside 0..2**64-1")
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, 0, STREAMS[stream]]))


def sample_scene(
    seed: int, index: int, *, split: Split = "train", things: int | None = None, pairs: float = 0.25, motions: Sequence[str] = MOTIONS
) -> Scene:
    """The scene number `index` of the endless series `seed`.

    split: "train" shows no pair of HELD_OUT, "held_out" at least one, "any" whatever comes.
    things: 1 or 2; None: two in a share `pairs` of the scenes. Two things always differ in colour.
    motions: what a thing may do; one that is named twice comes twice as often.
    """
    if split not in ("train", "held_out", "any"):
        raise ValueError(f"split {split!r}: use train, held_out or any")
    if things not in (None, 1, 2):
        raise ValueError(f"things {things!r}: use 1, 2 or None")
    rng = generator(seed, index, "scene")
    count = (2 if rng.random() < pairs else 1) if things is None else things
    looks = [_look(rng, split if place == 0 or split != "held_out" else "any", motions) for place in range(count)]
    while count == 2 and looks[1][1] == looks[0][1]:
        looks[1] = _look(rng, "any" if split == "held_out" else split, motions)
    if count == 2 and rng.random() < 0.5:  # else a held-out pair would always come first
        looks.reverse()
    background = str(rng.choice(list(BACKGROUNDS)))
    scene = Scene(place_things(rng, looks), background, _gradient(rng))
    sideways = any(thing.motion in ("moves left", "moves right") for thing in scene.things)
    if rng.random() < (0.1 if sideways else 0.01):
        scene = replace(scene, wall=new_wall(rng))
    return scene


def new_wall(rng: np.random.Generator) -> Wall:
    """Of any width, about the middle of the frame."""
    return Wall(x=float(rng.uniform(44, 84)), width=float(rng.uniform(16, 36)))


def _look(rng: np.random.Generator, split: Split, motions: Sequence[str]) -> Look:
    pairs = [pair for pair in product(COLOURS, SHAPES) if split == "any" or (pair in HELD_OUT) == (split == "held_out")]
    colour, shape = pairs[rng.integers(len(pairs))]
    return shape, colour, str(rng.choice(list(SIZES))), motions[int(rng.integers(len(motions)))]


def _gradient(rng: np.random.Generator) -> float:
    return float(rng.uniform(-15, 15)) if rng.random() < 0.5 else 0.0


def place_things(rng: np.random.Generator, looks: Sequence[Look]) -> tuple[Thing, ...]:
    """Start positions and speeds for one or two things, so that what a caption says of them is seen.

    For two thirds of a clip no straight mover comes to an edge; within them, what bounces meets the floor. A still thing is never
    displaced: whatever meets it bounces off. What bounces or circles keeps out of the other's way. Half of the pairs of
    straight movers, and a quarter of the pairs of a mover and a still thing, are set up to meet within a clip.
    """
    if len(looks) == 1:
        return (_place(rng, looks[0], alone=True),)
    movers = sum(look[3] in DIRECTIONS for look in looks)
    wish = bool(rng.random() < (0.5 if movers == 2 else 0.25))
    for attempt in range(20_000):
        first, second = (_place(rng, look, alone=False) for look in looks)
        if first.turn and second.turn:  # in step, so that their distance stays the same
            second = _on_orbit(second, first)
        if _compatible(first, second, wish and attempt < 200):
            return first, second
    raise AssertionError(f"no room for {looks}")


def _place(rng: np.random.Generator, look: Look, alone: bool) -> Thing:
    shape, colour, size, motion = look
    radius = SIZES[size]
    low, high = radius, FRAME - radius
    x, y = (float(value) for value in rng.uniform(low, high, 2))
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        speed = float(rng.uniform(1, 3))
        start = float(rng.uniform(0, high - low - speed * (2 * CLIP // 3)))
        if dx:
            x = low + start if dx > 0 else high - start
        else:
            y = low + start if dy > 0 else high - start
        return Thing(shape, colour, size, motion, x, y, dx * speed, dy * speed)
    if motion == "bounces":
        height = float(rng.uniform(35, 70 if alone else 50))
        landing, landing_time = float(np.sqrt(2 * GRAVITY * height)), float(rng.uniform(3, 2 * CLIP // 3))
        risen, vy = landing * landing_time - 0.5 * GRAVITY * landing_time**2, landing - GRAVITY * landing_time
        vx = float(rng.uniform(-1.5, 1.5)) if alone else 0.0
        return Thing(shape, colour, size, motion, x, high - risen, vx, vy)
    if motion == "circles":
        orbit = float(rng.uniform(20, 35 if alone else 23))
        turn = float(2 * np.pi / rng.uniform(28, 44)) * (1 if rng.random() < 0.5 else -1)
        angle = float(rng.uniform(0, 2 * np.pi))
        centre_x, centre_y = (float(value) for value in rng.uniform(low + orbit, high - orbit, 2))
        dx, dy = orbit * np.cos(angle), orbit * np.sin(angle)
        return Thing(shape, colour, size, motion, float(centre_x + dx), float(centre_y + dy), float(-dy * turn), float(dx * turn), turn)
    return Thing(shape, colour, size, motion, x, y)


def _on_orbit(thing: Thing, other: Thing) -> Thing:
    """`thing`, circling around its own centre in step with `other`."""
    (x, y, _), (other_x, other_y, _) = thing.orbit, other.orbit
    return replace(thing, x=x + other.x - other_x, y=y + other.y - other_y, vx=other.vx, vy=other.vy, turn=other.turn)


def _compatible(a: Thing, b: Thing, meet: bool) -> bool:
    gap = a.radius + b.radius + 2
    if np.hypot(a.x - b.x, a.y - b.y) < gap + 4 or not (_inside(a) and _inside(b)):
        return False
    if a.turn and b.turn:
        return True
    free = {a.motion, b.motion} <= {*DIRECTIONS, "stays still"} and (a.moves or b.moves)
    if (a.moves and b.moves) or (meet and free):
        when = meeting(a, b)
        return 6 < when < 20 if meet else when > 6
    (left, top, right, bottom), (b_left, b_top, b_right, b_bottom) = _swept(a), _swept(b)
    return left > b_right + 2 or b_left > right + 2 or top > b_bottom + 2 or b_top > bottom + 2


def _inside(thing: Thing) -> bool:
    left, top, right, bottom = _swept(thing)
    return min(left, top) >= -1e-9 and max(right, bottom) <= FRAME + 1e-9


def _swept(thing: Thing) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of everything the thing can ever touch while nothing deflects it."""
    r = thing.radius
    if thing.turn:
        x, y, orbit = thing.orbit
        return x - orbit - r, y - orbit - r, x + orbit + r, y + orbit + r
    left, right = (0.0, FRAME) if thing.vx else (thing.x - r, thing.x + r)
    if thing.motion == "bounces":
        return left, thing.y - thing.vy**2 / (2 * GRAVITY) - r, right, FRAME
    top, bottom = (0.0, FRAME) if thing.vy else (thing.y - r, thing.y + r)
    return left, top, right, bottom


def meeting(a: Thing, b: Thing) -> float:
    """Frames until two straight movers touch if no edge comes first; infinity if they never do."""
    return touch_time(b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy, a.radius + b.radius)


def touch_time(x: float, y: float, vx: float, vy: float, reach: float) -> float:
    """First time at which the point (x, y) with constant velocity comes within `reach` of the origin; infinity if never."""
    approach, speed2 = x * vx + y * vy, vx * vx + vy * vy
    root = approach * approach - speed2 * (x * x + y * y - reach * reach)
    if approach >= 0 or root <= 0:
        return float("inf")
    return max((-approach - root**0.5) / speed2, 0.0)

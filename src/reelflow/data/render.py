"""From a scene to pixels: exact motion between events, and anti-aliased drawing of bounding boxes only.

Shape suffixes: N clips, F frames, S frame side in pixels, P patch side in pixels, M things of one kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from reelflow.data.scene import BACKGROUNDS, CLIP, COLOURS, FRAME, GRAVITY, SIZES, WALL_COLOUR, Scene, Thing, touch_time

PIECE = {"cpu": 1 << 17, "other": 1 << 26}  # pixels drawn at once: in the cache of a CPU core, all that fits elsewhere


class _Body:
    """State of a thing in flight: position, velocity, downward pull, and mass (its area; infinite if nothing moves it)."""

    def __init__(self, thing: Thing, pace: float = 1.0) -> None:
        self.x, self.y, self.vx, self.vy = thing.x, thing.y, thing.vx * pace, thing.vy * pace
        self.radius, self.turn = thing.radius, thing.turn * pace
        self.pull = GRAVITY * pace**2 if thing.motion == "bounces" else 0.0
        self.mass = thing.radius**2 if thing.moves else np.inf
        self.solid = thing.moves or thing.motion == "stays still"

    def ahead(self, time: np.ndarray | float) -> tuple[np.ndarray | float, np.ndarray | float]:
        """Position after `time` frames without an event."""
        if self.turn:
            dx, dy = self.vy / self.turn, -self.vx / self.turn
            cos, sin = np.cos(self.turn * time), np.sin(self.turn * time)
            return self.x - dx + dx * cos - dy * sin, self.y - dy + dx * sin + dy * cos
        return self.x + self.vx * time, self.y + self.vy * time + 0.5 * self.pull * time * time

    def advance(self, time: float) -> None:
        self.x, self.y = (float(value) for value in self.ahead(time))
        if self.turn:
            cos, sin = np.cos(self.turn * time), np.sin(self.turn * time)
            self.vx, self.vy = float(self.vx * cos - self.vy * sin), float(self.vx * sin + self.vy * cos)
        self.vy += self.pull * time

    def edge(self) -> tuple[float, str]:
        """Frames until it touches an edge of the frame, and the velocity that this turns round."""
        if self.turn:
            return np.inf, ""
        low, high = self.radius, FRAME - self.radius
        in_x = ((high if self.vx > 0 else low) - self.x) / self.vx if self.vx else np.inf
        if self.pull:
            in_y = (-self.vy + max(self.vy**2 + 2 * self.pull * (high - self.y), 0.0) ** 0.5) / self.pull
        else:
            in_y = ((high if self.vy > 0 else low) - self.y) / self.vy if self.vy else np.inf
        return (max(in_x, 0.0), "vx") if in_x < in_y else (max(in_y, 0.0), "vy")


def _collide(a: _Body, b: _Body) -> None:
    """Elastic collision of two discs along the line between their centres."""
    nx, ny = b.x - a.x, b.y - a.y
    length = (nx * nx + ny * ny) ** 0.5
    nx, ny = nx / length, ny / length
    closing = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
    share = 1.0 if np.isinf(b.mass) else 0.0 if np.isinf(a.mass) else b.mass / (a.mass + b.mass)
    for body, part in ((a, -share), (b, 1 - share)):
        body.vx += 2 * part * closing * nx
        body.vy += 2 * part * closing * ny


def _fly(bodies: Sequence[_Body], start: int, stop: int, solid: bool, out: np.ndarray) -> None:
    """Moves the bodies from frame `start` to frame `stop`, from event to event, and notes frames start..stop-1 in `out`."""
    clock, frame = float(start), start
    together = solid and len(bodies) == 2 and all(body.solid for body in bodies)
    while True:
        events: list[tuple[float, _Body | None, str]] = [(body.edge()[0], body, body.edge()[1]) for body in bodies]
        if together:
            a, b = bodies
            events.append((touch_time(b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy, a.radius + b.radius), None, ""))
        wait, body, axis = min(events, key=lambda event: event[0])
        until = min(clock + wait, float(stop))
        last = min(int(np.ceil(until)), stop)
        if last > frame:
            times = np.arange(frame, last) - clock
            for place, flying in enumerate(bodies):
                out[frame:last, place, 0], out[frame:last, place, 1] = flying.ahead(times)
            frame = last
        for flying in bodies:
            flying.advance(until - clock)
        clock = until
        if clock >= stop:
            return
        if body is None:
            _collide(*bodies)
        else:
            setattr(body, axis, -getattr(body, axis))


def simulate(scene: Scene, frames: int = CLIP, size: int = 128, start: int = 0, pace: float = 1.0) -> np.ndarray:
    """Centres of the things, float64 (frames, things, 2) as x, y in pixels of a `size` x `size` frame.

    Straight movers and bouncing things reflect from the frame's edges; two straight movers collide elastically (mass is
    the square of the radius), a straight mover reflects from a still thing. Each flight between two events is in closed
    form, so results do not depend on a time step; the physics is the same at every size. `start`: first frame shown.
    `pace`: sixteenths of a second from one frame to the next; a scene with a twist has 1.
    """
    assert pace == 1 or scene.twist is None
    total = start + frames
    out = np.empty((total, len(scene.things), 2))
    bodies = [_Body(thing, pace) for thing in scene.things]
    twist = scene.twist
    if twist is None or twist.frame >= total:
        _fly(bodies, 0, total, True, out)
    else:
        _fly(bodies, 0, twist.frame, True, out)
        if twist.kind == "jump":
            body = bodies[twist.thing]
            body.x, body.y = twist.x, twist.y
            if body.turn:  # to the other side of its circle
                body.vx, body.vy = -body.vx, -body.vy
        _fly(bodies, twist.frame, total, twist.kind not in ("vanish", "pass"), out)
    return out[start:] * (size / FRAME)


def _ball(x: Tensor, y: Tensor, r: float) -> Tensor:
    return torch.sqrt(x * x + y * y) - r


def _box(x: Tensor, y: Tensor, r: float) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.886 * r  # the area of the ball


def _triangle(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Equilateral, tip up, 1.725 r high, its bounding box centred."""
    side = 0.8660254 * x.abs() - 0.5 * y - 0.43125 * r
    return torch.maximum(side, y - 0.8625 * r)


def _star(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Five tips at 1.1 r, notches at 0.53 r, its bounding box centred; one straight edge in the half-wedge of each tip."""
    tip, notch = 1.1 * r, 0.53 * r
    x, y = x.abs(), y - 0.105 * r
    along = torch.maximum(torch.maximum(-y, 0.9510565 * x - 0.3090170 * y), 0.5877853 * x + 0.8090170 * y)
    across = torch.sqrt((x * x + y * y - along * along).clamp_min(0))
    edge_x, edge_y = tip - 0.8090170 * notch, 0.5877853 * notch  # from the notch to the tip: (edge_x, -edge_y)
    length = float(np.hypot(edge_x, edge_y))
    return (along * edge_y + across * edge_x - tip * edge_y) / length


OUTLINES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"ball": _ball, "box": _box, "triangle": _triangle, "star": _star}


def coverage(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """How much of the pixel at (x, y) from the centre the shape covers, 0..1, with an edge one pixel wide."""
    return (0.5 - OUTLINES[shape](x, y, radius)).clamp_(0, 1)


def _backdrop(scenes: Sequence[Scene], frames: int, size: int, device: torch.device) -> Tensor:
    """Background alone, uint8 (N, F, S, S, 3)."""
    colour = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    slope = torch.tensor([scene.gradient for scene in scenes], dtype=torch.float32)
    height = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    rows = (colour[:, None] + slope[:, None, None] * height[None, :, None]).round_().clamp_(0, 255).to(torch.uint8)
    still = rows.to(device)[:, :, None].expand(-1, size, size, 3).contiguous()
    return still[:, None].expand(-1, frames, size, size, 3).contiguous()


def _look(scene: Scene, place: int, frames: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (F, 3) and opacity (F,) of one thing over time."""
    paint = np.empty((frames, 3), np.float32)
    paint[:] = COLOURS[scene.things[place].colour]
    opacity = np.ones(frames, np.float32)
    twist = scene.twist
    if twist is not None and twist.thing == place:
        after = max(twist.frame - start, 0)
        if twist.kind == "colour":
            paint[after:] = COLOURS[twist.colour]
        elif twist.kind == "vanish":
            opacity[after:] = 0
    return paint, opacity


def _stamp(canvas: Tensor, where: Tensor, centre: Tensor, paint: Tensor, opacity: Tensor, shape: str, radius: float) -> None:
    """Draws one kind of thing into frames of `canvas` (N·F, S, S, 3): frame `where` (M,), `centre` (M, 2), `paint` (M, 3)."""
    side = canvas.shape[1]
    patch = min(2 * int(np.ceil(1.06 * radius)) + 3, side)
    corner = (centre.floor().to(torch.int64) - patch // 2).clamp_(0, side - patch)
    grid = torch.arange(patch, device=canvas.device)
    column, row = corner[:, :1] + grid, corner[:, 1:] + grid  # (M, P)
    x, y = column + 0.5 - centre[:, :1], row + 0.5 - centre[:, 1:]
    alpha = coverage(shape, x[:, None, :], y[:, :, None], radius) * opacity[:, None, None]
    index = ((where[:, None] * side + row)[:, :, None] * side + column[:, None, :]).flatten()
    flat = canvas.view(-1, 3)
    under = flat.index_select(0, index).view(len(where), patch * patch, 3).to(torch.float32)
    under += alpha.view(len(where), -1, 1) * (paint[:, None] - under)
    flat.index_copy_(0, index, under.round_().to(torch.uint8).view(-1, 3))


def _draw_wall(clip: Tensor, scene: Scene) -> None:
    """Draws the wall over a clip (F, S, S, 3), in place."""
    assert scene.wall is not None
    size = clip.shape[1]
    scale = size / FRAME
    left, right = (scene.wall.x - scene.wall.width / 2) * scale, (scene.wall.x + scene.wall.width / 2) * scale
    first, last = max(int(np.floor(left)), 0), min(int(np.ceil(right)), size)
    column = torch.arange(first, last, dtype=torch.float32)
    alpha = ((column + 1).clamp_max(right) - column.clamp_min(left)).to(clip.device)[:, None]
    under = clip[:, :, first:last].to(torch.float32)
    grey = torch.tensor(WALL_COLOUR, dtype=torch.float32, device=clip.device)
    clip[:, :, first:last] = (under + alpha * (grey - under)).round_().to(torch.uint8)


def render(
    scenes: Sequence[Scene], frames: int = CLIP, size: int = 128, device: str | torch.device = "cpu", start: int = 0, pace: float = 1.0
) -> Tensor:
    """Pictures of scenes, uint8 (N, F, size, size, 3) in sRGB on `device`, frames `start` to `start + frames - 1`.

    The same on every device to within one level. ValueError for no frames or a size below 16.
    """
    if frames < 1 or start < 0 or size < 16:
        raise ValueError(f"frames {frames}, start {start}, size {size}: need frames >= 1, start >= 0, size >= 16")
    device = torch.device(device)
    canvas = _backdrop(scenes, frames, size, device)
    flat = canvas.view(-1, size, size, 3)
    tracks = [simulate(scene, frames, size, start, pace) for scene in scenes]
    for place in range(max((len(scene.things) for scene in scenes), default=0)):
        kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, scene in enumerate(scenes):
            if place < len(scene.things):
                kinds[scene.things[place].shape, scene.things[place].size].append(number)
        for (shape, extent), members in kinds.items():
            radius = SIZES[extent] * size / FRAME
            piece = max(int(PIECE.get(device.type, PIECE["other"]) / (frames * (2 * radius + 4) ** 2)), 1)
            for first in range(0, len(members), piece):
                some = members[first : first + piece]
                looks = [_look(scenes[number], place, frames, start) for number in some]
                where, centre, paint, opacity = (
                    torch.from_numpy(np.concatenate(rows)).to(device)
                    for rows in (
                        [np.arange(number * frames, (number + 1) * frames) for number in some],
                        [tracks[number][:, place].astype(np.float32) for number in some],
                        [paint for paint, _ in looks],
                        [opacity for _, opacity in looks],
                    )
                )
                _stamp(flat, where, centre, paint, opacity, shape, radius)
    for number, scene in enumerate(scenes):
        if scene.wall is not None:
            _draw_wall(canvas[number], scene)
    return canvas

"""Names the motion of a track: rest, a straight line with turns, bouncing, circling.

Legend: F frames, G candidates, n numbers fitted to, k coefficients, m columns. Lengths are in pixels of a 128 x 128 frame.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from reelflow.data.scene import CLIP, DIRECTIONS

UNEVEN = 1.0
"""Pixels that a thing may be off an even course and still be on it. With two, one of forty true pairs is misread: what collides seems
to bounce."""

LASTING = 4
"""Frames that an error of a course lasts, those of one latent frame: together they say as much of the course as one frame that has an error
of its own. With 1 here, lines with three turns bend with the errors of what circles or trembles, and are taken for its motion."""


def motion_of(track: np.ndarray, present: np.ndarray) -> str:
    """Name of the motion of a track (F, 2), in pixels of 128, seen in the frames `present` (F,).

    Four models are fitted by least squares (rest, straight lines with up to three turns, arcs of a bouncing ball, circle)
    and compared by the Bayesian information criterion with a noise floor of `UNEVEN`, of errors that last `LASTING` frames.
    """
    time = np.flatnonzero(present[:CLIP]).astype(np.float64)
    path = track[time.astype(int)]
    if len(time) < 5:
        return "stays still"
    count = path.size / LASTING

    def cost(squares: float, parameters: int) -> float:
        return count * np.log(squares / path.size + UNEVEN**2) + parameters * np.log(count)

    costs = {"stays still": cost(((path - path.mean(0)) ** 2).sum(), 2)}
    lines, velocity = _fit_lines(time, path)
    for turns, squares in enumerate(lines):
        costs[f"lines {turns}"] = cost(squares, 4 + 3 * turns)
    costs["bounces"] = cost(_fit_bounces(time, path), 7)
    costs["circles"] = cost(_fit_circle(time, path), 6)
    best = min(costs, key=lambda name: costs[name])
    if not best.startswith("lines"):
        return best
    speed = velocity[int(best[-1])]
    if np.abs(speed).max() < 0.4:
        return "stays still"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], speed)))


def _solve(design: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares for a stack of designs (G, n, k) and targets (n, m): coefficients (G, k, m), sums of squares (G,)."""
    transposed = design.swapaxes(-1, -2)
    coefficients = np.linalg.solve(transposed @ design + 1e-9 * np.eye(design.shape[-1]), transposed @ target)
    return coefficients, ((design @ coefficients - target) ** 2).sum((-1, -2))


def _fit_lines(time: np.ndarray, path: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Best straight motion with 0, 1, … sudden turns: sums of squares, and initial velocities (2,).

    Up to two turns; a third where two leave errors of half a pixel.
    """
    knots = np.arange(time[0] + 3, time[-1] - 1)
    squares: list[float] = []
    velocities: list[np.ndarray] = []
    for turns in range(4):
        if turns == 3 and squares[-1] < 0.25 * path.size:
            break
        chosen = list(combinations(knots, turns))
        places = np.array(chosen, dtype=float).reshape(len(chosen), turns)
        places = places[np.all(np.diff(places) >= 3, axis=1)]
        if not len(places):
            continue
        hinges = np.maximum(time[None, :, None] - places[:, None, :], 0)
        base = np.broadcast_to(np.stack([np.ones_like(time), time], -1), (len(places), len(time), 2))
        coefficients, errors = _solve(np.concatenate([base, hinges], -1), path)
        best = int(errors.argmin())
        squares.append(float(errors[best]))
        velocities.append(coefficients[best, 1])
    return squares, velocities


def _fit_bounces(time: np.ndarray, path: np.ndarray) -> float:
    """Sum of squares of the best chain of arcs over a floor, sideways drift with at most one turn; infinity if none fits."""
    periods = np.arange(16, 45, 0.5)
    phases = np.arange(0, 1, 1 / 48)
    period, phase = (grid.reshape(-1, 1) for grid in np.meshgrid(periods, phases))
    along = np.mod(time - phase * period, period)
    arcs = -along * (period - along)
    coefficients, errors = _solve(np.stack([np.ones_like(arcs), arcs], -1), path[:, 1:])
    gravity = 2 * coefficients[:, 1, 0]
    errors = np.where((gravity > 0.2) & (gravity < 1.2), errors, np.inf)
    drift = min(_fit_lines(time, path[:, :1])[0][:2])
    return float(errors.min()) + drift


def _fit_circle(time: np.ndarray, path: np.ndarray) -> float:
    """Sum of squares of the best even run on a circle of radius 8 to 50, at least six tenths of it; infinity if none fits."""
    turn = 2 * np.pi / np.arange(16, min(64, (time[-1] - time[0]) / 0.6), 0.5)
    if not len(turn):
        return float("inf")
    turn = np.concatenate([turn, -turn])[:, None] * time
    cos, sin, zero, one = np.cos(turn), np.sin(turn), np.zeros_like(turn), np.ones_like(turn)
    design = np.concatenate([np.stack([one, zero, cos, -sin], -1), np.stack([zero, one, sin, cos], -1)], 1)
    coefficients, errors = _solve(design, np.concatenate([path[:, :1], path[:, 1:]]))
    radius = np.hypot(coefficients[:, 2, 0], coefficients[:, 3, 0])
    return float(np.where((radius > 8) & (radius < 50), errors, np.inf).min())

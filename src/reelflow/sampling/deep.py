"""The deep block over a video of any length, frame by frame.

Beyond the trained length the video is sampled in windows, as by the reference: text and the last frames are read again
from place 0, and new frames sampled behind them; or approximately, in one go, with a `Ring`.

Shapes: B clips, F latent frames, S places of a frame, C latent channels, L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict, Unpack

from torch import Tensor

from reelflow.flow import StarFlow, order, to_tokens
from reelflow.flow.affine import wide
from reelflow.sampling.conditioner import Conditioner, Ring
from reelflow.sampling.schedules import Progress, Report, Schedule, Solver, silent

Texts = Sequence[tuple[int, Tensor | None]]
"""(first latent frame, text states from it on), in order, the first from frame 0; with guidance 2B rows, conditional ones first."""


class Window(NamedTuple):
    """Frames `first … stop − 1` are sampled with `text`, after `start … first − 1` were read; `start` stands at place 0."""

    start: int
    first: int
    stop: int
    text: Tensor | None


def windows(frames: int, known: int, window: int, context: int, texts: Texts) -> list[Window]:
    """How a video is sampled: another text begins a window, too, with as much context as there is."""
    found, done, changes = [], known, [frame for frame, _ in texts[1:]]
    while done < frames:
        again = done >= window or done in changes
        start = max(0, done - context) if again else 0
        stop = min([frames, start + window, *(frame for frame in changes if frame > done)])
        found.append(Window(start, done, stop, [text for frame, text in texts if frame <= done][-1]))
        done = stop
    return found


class Settings(TypedDict, total=False):
    """window: latent frames the deep block sees together, by default the trained length.  context: frames read again when
    sampling beyond it, 1 … window − 1, by default 3/4 of it.  ring: beyond it, do not read again, see `conditioner.Ring`.
    schedule: how each block is inverted.  progress: called with the number of tokens finished, each counted once per block
    and clip.
    """

    window: int | None
    context: int | None
    ring: bool
    schedule: Schedule
    progress: Progress


def deep_frames(
    model: StarFlow, noise_BFChw: Tensor, texts: Tensor | Texts | None, guidance: float, prefix_BFChw: Tensor | None,
    reports: dict[str, Report], ahead: bool, **settings: Unpack[Settings],
) -> Iterator[Tensor]:  # fmt: skip
    """The deep block's frames (B, S, C) in raster order, each as soon as all clips have it; those of the prefix are left out.

    `ahead`: read the next window's context frame by frame as it comes, into a second cache: more memory, no pause.
    """
    block, schedule = model.deep_block, settings.get("schedule", Schedule())
    plan, ring = check(model, noise_BFChw, texts, guidance, prefix_BFChw, settings), settings.get("ring", False)
    stride = noise_BFChw.shape[-2] * noise_BFChw.shape[-1]
    z = order(wide(to_tokens(noise_BFChw)), block).flatten(1, 2)
    solver = Solver("deep block", block, z, stride, schedule, settings.get("progress", silent))
    if prefix_BFChw is not None:
        solver.give(order(model.to_deep(prefix_BFChw)[0], block).flatten(1, 2))

    def memory() -> Conditioner:
        return conditioner(model, noise_BFChw, guidance, solver.window, settings)

    present, read = memory(), 0
    spare = memory() if ahead and len(plan) > 1 and not ring else None
    for now, following in zip(plan, [*plan[1:], None], strict=True):
        present.read_text(now.text)
        base = 0 if ring else now.start * stride
        solver.read(present, base, max(base, read), now.first * stride)
        solver.guess(solver.at[:, None] + solver.ahead)
        if spare and following:
            spare.read_text(following.text)
            read = following.start * stride
        for frame in range(now.first, now.stop):
            end = (frame + 1) * stride
            solver.solve(present, base, end, now.stop * stride)
            if spare and following and frame >= following.start:
                solver.read(spare, following.start * stride, read, end)
                read = end
            reports["deep"] = solver.report
            yield order(solver.tokens(end - stride, end)[:, None], block)[:, 0]
        if ring:
            read = now.stop * stride
        elif spare:
            present, spare = spare, present


def conditioner(model: StarFlow, noise_BFChw: Tensor, guidance: float, places: int, settings: Settings) -> Conditioner:
    """The deep block's, for one window and `places` beyond it."""
    clips, frames, _, *size = noise_BFChw.shape
    window = settings.get("window") or model.config.window
    if settings.get("ring"):
        return Ring(model, model.deep_block, clips, (size[0], size[1]), window - 1, guidance)
    return Conditioner(model, model.deep_block, clips, (size[0], size[1]), min(window, frames) * size[0] * size[1] + places, guidance)


def check(
    model: StarFlow, noise_BFChw: Tensor, texts: Tensor | Texts | None, guidance: float, prefix_BFChw: Tensor | None, settings: Settings
) -> list[Window]:
    """The windows to sample. Raises ValueError for settings outside their range, an overlong prefix, missing text."""
    clips, frames = noise_BFChw.shape[:2]
    window = settings.get("window") or model.config.window
    given = settings.get("context")
    context = default_context(window) if given is None else given
    prefix = 0 if prefix_BFChw is None else prefix_BFChw.shape[1]
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance {guidance} is not usable; give a number ≥ 0 (0 switches it off)")
    if frames > window and not 1 <= context < window:
        raise ValueError(f"context of {context} frames does not fit the window of {window}; give 1 … {window - 1}")
    if prefix and prefix >= frames:
        raise ValueError(f"{prefix} of {frames} latent frames are given; nothing is left to sample")
    parts: Texts = [(0, texts)] if texts is None or isinstance(texts, Tensor) else texts
    rows = clips * (2 if guidance else 1)
    for found in (0 if states is None else len(states) for _, states in parts):
        if model.deep_block.proj_text is not None and found != rows:
            raise ValueError(f"{found} text states for {clips} clips at guidance {guidance:g}; this model needs {rows}")
    return windows(frames, prefix, frames if settings.get("ring") else window, context, parts)


def default_context(window: int) -> int:
    """Frames read again beyond the window: 16 of 21 in the reference, the same share elsewhere; 1 … window − 1."""
    return max(1, min(window - 1, round(window * 16 / 21)))

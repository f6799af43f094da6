"""What tokens see: rotary positions, the key cache, the denoiser's window.

Shapes: B batch, F latent frames, S places of a frame, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelflow.config import FlowConfig
from reelflow.flow import to_tokens
from reelflow.flow.rope import positions, rotary
from reelflow.sampling.conditioner import Conditioner


def test_positions_of_text_and_video() -> None:
    """(row, column, third axis): text at i · P / L on the third axis, rows and columns scaled by P / √(h · w)."""
    unit = 8 / (2 * 3) ** 0.5
    text = [(0, 0, i * 8 / 4) for i in range(4)]
    video = [(row * unit, column * unit, frame) for frame in range(2) for row in range(2) for column in range(3)]
    torch.testing.assert_close(positions(torch.arange(-4, 12), 2, 3, span=8, text_tokens=4), torch.tensor(text + video))


@pytest.mark.parametrize("third_axis", [True, False])
def test_frequencies_of_the_three_groups(third_axis: bool) -> None:
    head_dim, position = 32, torch.tensor([[1.5, -2.0, 3.0]])
    spatial = head_dim // 2 - (8 if third_axis else 0)
    rows = [1.5 * 10_000 ** (-2 * i / spatial) for i in range(spatial // 2)]
    columns = [-2.0 * 10_000 ** (-2 * i / spatial) for i in range(spatial // 2)]
    angles = torch.tensor(rows + columns + ([3.0 * 10_000 ** (-j / 8) for j in range(8)] if third_axis else []))
    torch.testing.assert_close(rotary(position, head_dim, third_axis).turn[0], torch.polar(torch.ones_like(angles), angles))


@pytest.mark.parametrize("halves", [False, True])
def test_rotation_turns_pairs_of_channels(halves: bool) -> None:
    table = rotary(positions(torch.arange(12), 2, 2, span=4), 24, third_axis=True, halves=halves)
    x = torch.randn(2, 3, 12, 24).double()
    found = table.rotate(x)
    first, second = (slice(0, 12), slice(12, 24)) if halves else (slice(0, 24, 2), slice(1, 24, 2))
    cos, sin = table.turn.real, table.turn.imag
    torch.testing.assert_close(found[..., first], x[..., first] * cos - x[..., second] * sin, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[..., second], x[..., first] * sin + x[..., second] * cos, atol=1e-6, rtol=0)


def test_scores_depend_on_the_distance_in_time_only() -> None:
    table = rotary(positions(torch.arange(8), 1, 1, span=4), 24, third_axis=True)
    q, k = torch.randn(2, 1, 1, 1, 24).expand(-1, -1, -1, 8, -1)
    scores = (table.rotate(q) @ table.rotate(k).mT)[0, 0]
    for distance in range(-7, 8):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def conditioner(tiny: Any, block: torch.nn.Module) -> tuple[Conditioner, torch.Tensor]:
    """The cached parameter function of a block, and the block's tokens (frames folded into shallow batches)."""
    deep, size = block is tiny.model.deep_block, (tiny.x.shape[-2], tiny.x.shape[-1])
    tokens = to_tokens(tiny.x).flatten(1, 2) if deep else to_tokens(tiny.x).flatten(0, 1)
    found = Conditioner(tiny.model, block, len(tokens), size, tokens.shape[1])
    found.read_text(tiny.text if deep else None)
    return found, tokens


@pytest.mark.parametrize("name", ["deep_block", "shallow_blocks.0"])
@torch.no_grad()
def test_cached_is_uncached(tiny: Any, name: str) -> None:
    """For any split of the sequence into passes, also where places were first read with guesses and are read again."""
    block = tiny.model.get_submodule(name)
    cached, tokens = conditioner(tiny, block)
    inputs, end = block.start(tokens), tokens.shape[1]
    table = tiny.model.rotary(torch.arange(-cached.text, inputs.shape[1]), cached.size, bool(cached.text))
    wanted = torch.cat(block.affine(tokens, table, tiny.text if cached.text else None), -1)[:, block.first :]

    @settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sets(st.integers(1, inputs.shape[1] - 1)), st.booleans())
    @torch.no_grad()
    def check(cuts: set[int], guess_first: bool) -> None:
        found = []
        for start, stop in pairwise([0, *sorted(cuts), inputs.shape[1]]):
            place = torch.arange(start, inputs.shape[1])[None] + block.first
            if guess_first:
                cached(torch.randn_like(inputs[:, start:]), place, end)
            found.append(torch.cat(cached(inputs[:, start:stop], place[:, : stop - start], stop + block.first), -1))
        torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-9, rtol=0)

    check()


@torch.no_grad()
def test_every_clip_has_places_of_its_own(tiny: Any) -> None:
    """One pass over different places of the two clips gives what each has there."""
    block = tiny.model.deep_block
    cached, tokens = conditioner(tiny, block)
    inputs, end = block.start(tokens), tokens.shape[1]
    wanted = cached(inputs, torch.arange(inputs.shape[1])[None] + block.first, end).shift
    starts = torch.tensor([0, 2])
    index = starts[:, None] + torch.arange(3)
    found = cached(torch.stack([row[at] for row, at in zip(inputs, index, strict=True)]), index + block.first, end)
    torch.testing.assert_close(found.shift, torch.stack([row[at] for row, at in zip(wanted, index, strict=True)]))


def reached(frames: int, layers: int, ahead: int, ahead_layers: str, window: int | None, text: bool) -> torch.Tensor:
    """(F, F) bool: which frames of x may move which frame of the output. Node 0 is the text, node f + 1 frame f."""
    total = torch.eye(frames + 1).bool()
    for layer in range(layers):
        look = ahead if layer == 0 or ahead_layers == "all" else 1
        sees = torch.zeros(frames + 1, frames + 1).bool()
        sees[0, 0] = text
        sees[0, 1 : 1 + look] = text
        for f in range(frames):
            sees[f + 1, 0] = text
            first = 0 if window is None else max(0, f + look - 1 - window)
            sees[f + 1, 1 + first : 1 + f + look] = True
        total = ((sees | torch.eye(frames + 1).bool()).float() @ total.float()) > 0
    return total[1:, 1:]


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(
    ("layers", "look_ahead", "look_ahead_layers", "window"),
    [(1, 2, "all", 3), (3, 2, "all", 2), (3, 2, "first", 2), (2, 1, "all", 1), (2, 3, "first", None), (1, 2, "all", 1)],
)
def test_denoiser_sees_its_window(
    build: Callable, layers: int, look_ahead: int, look_ahead_layers: str, window: int | None, text: bool
) -> None:
    denoiser = {"layers": layers, "width": 24, "look_ahead": look_ahead, "look_ahead_layers": look_ahead_layers, "window": window}
    model, x, states = build(batch=1, frames=7, denoiser=denoiser | {"text": text})
    slopes = torch.autograd.functional.jacobian(lambda x: model.score(x, states), x, vectorize=True)
    moves = slopes[0, :, :, :, :, 0].abs().sum((1, 2, 3, 5, 6, 7)) > 0
    assert torch.equal(moves, reached(7, layers, look_ahead, look_ahead_layers, window, text))
    ahead = max(int(row.nonzero().max()) - f for f, row in enumerate(moves))
    assert ahead == min(6, (look_ahead - 1) * (layers if look_ahead_layers == "all" else 1))


def test_denoiser_looks_at_its_own_frame_and_text(build: Callable) -> None:
    model, x, text = build(batch=1, frames=1)
    slopes = torch.autograd.functional.jacobian(lambda x: to_tokens(model.score(x, text))[0, 0], x, vectorize=True)
    assert (to_tokens(slopes.flatten(0, 1)[:, 0])[:, 0].abs().sum(-1) > 0).all(), "every place of a frame sees every other"
    assert not torch.equal(model.score(x, text), model.score(x, text + 1))
    blind, _, _ = build(batch=1, denoiser={"layers": 1, "width": 24, "text": False})
    assert torch.equal(blind.score(x, text), blind.score(x, text + 1))
    with pytest.raises(ValueError, match="no learned denoiser; use the Tweedie step"):
        build(batch=1, denoiser=None).model.score(x, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 25}, "width 25 is not a multiple of head_dim 24"),
        ({"num_heads": 4, "num_kv_heads": 3}, "4 heads cannot share num_kv_heads = 3"),
        ({"text_tokens": 0}, "both zero or neither"),
        ({"positions": "learned"}, "needs learned_places"),
        ({"positions": "learned", "learned_places": 6}, "is for images"),
        ({"soft_clap": 4.0}, "soft_clap"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str, build: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig.parse(build().model.config.model_dump() | changes)

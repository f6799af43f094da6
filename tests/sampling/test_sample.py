"""The inverse: sequential is the oracle, every other schedule agrees with it; guidance, given frames, long windows.

Shapes: B batch, F latent frames, S places of a frame, C channels, h × w places.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from reelflow.evaluation.golden import load
from reelflow.flow import Affine, StarFlow, from_tokens, guide, order, to_tokens
from reelflow.sampling import Schedule, Settings, default_context, sample
from reelflow.sampling.schedules import LOOSER

SEQUENTIAL, EXACT = Schedule("sequential"), Schedule("jacobi", tolerance=0.0)
SIZE = (2, 4)
FRAMES = 4


class Setting(NamedTuple):
    """The video model of the golden vectors (window 5) in float32, on 4 frames of 2 × 4 places."""

    model: StarFlow
    noise: Tensor
    text: Tensor
    both: Tensor
    """Conditional texts, then unconditional ones."""


@pytest.fixture(scope="module")
def setting(golden: Path) -> Setting:
    found = load(golden / "starflow_v_mini")
    noise = torch.randn(2, FRAMES, 8, *SIZE, generator=torch.Generator().manual_seed(3))
    text = found.inputs["text"]
    return Setting(found.model, noise, text, torch.cat((text, found.inputs["text_null"])))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error, relative to that of `wanted`."""
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("schedule", [SEQUENTIAL, EXACT], ids=["sequential", "jacobi"])
def test_the_inverse_of_the_forward_map(setting: Setting, schedule: Schedule) -> None:
    x, _ = sample(setting.model, setting.noise, setting.text, schedule=schedule)
    with torch.no_grad():
        z = setting.model(x, setting.text).z
    torch.testing.assert_close(z, setting.noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, EXACT], ids=["sequential", "jacobi"])
def test_an_embedding_of_places_counts_within_every_frame(setting: Setting, schedule: Schedule) -> None:
    config = setting.model.config.model_copy(update={"learned_places": SIZE[0] * SIZE[1]})
    model = StarFlow(config)
    missing, _ = model.load_state_dict(setting.model.state_dict(), strict=False)
    assert {name.split(".")[-1] for name in missing} == {"pos_embed"}
    for block in model.blocks:
        torch.nn.init.normal_(block.pos_embed, std=0.5, generator=torch.Generator().manual_seed(4))
    x, _ = sample(model.requires_grad_(False), setting.noise, setting.text, schedule=schedule)
    with torch.no_grad():
        torch.testing.assert_close(model(x, setting.text).z, setting.noise, atol=1e-4, rtol=0)
        assert relative(setting.model(x, setting.text).z, setting.noise) > 0.01


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_jacobi_without_tolerance_is_exact(setting: Setting, window: int, guidance: float) -> None:
    model, noise, text, both = setting
    wanted, slow = sample(model, noise, both if guidance else text, guidance, schedule=SEQUENTIAL)
    found, fast = sample(model, noise, both if guidance else text, guidance, schedule=Schedule("jacobi", 0.0, window))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    for kind, tokens in ("deep", FRAMES * 8), ("shallow", 5 * 8):
        assert slow[kind].passes == slow[kind].evaluations == tokens
        assert fast[kind].passes <= tokens
        assert fast[kind].residual == 0


@pytest.mark.parametrize("window", [7, 64])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_default_tolerance_stays_within_its_bound(setting: Setting, window: int, guidance: float) -> None:
    model, noise, text, both = setting
    wanted, _ = sample(model, noise, both if guidance else text, guidance, schedule=SEQUENTIAL)
    found, report = sample(model, noise, both if guidance else text, guidance, schedule=Schedule(window=window))
    assert relative(found, wanted) < 1e-3
    assert (found - wanted).abs().max() < 0.02
    assert report["deep"].passes < FRAMES * 8
    assert report["deep"].passes <= report["deep"].evaluations <= report["deep"].passes * window
    assert 0 < report["deep"].residual <= LOOSER * 1e-3


def test_a_tighter_tolerance_is_closer(setting: Setting) -> None:
    model, noise, text, _ = setting
    wanted, _ = sample(model, noise, text, schedule=SEQUENTIAL)
    errors, passes = [], []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        found, report = sample(model, noise, text, schedule=Schedule(tolerance=tolerance))
        errors.append(relative(found, wanted))
        passes.append(report["deep"].passes)
    assert errors == sorted(errors, reverse=True)
    assert passes == sorted(passes)


def test_guidance_needs_both_texts_and_changes_the_deep_block_only(setting: Setting) -> None:
    model, noise, text, both = setting
    plain, _ = sample(model, noise, text, schedule=EXACT)
    same, _ = sample(model, noise, torch.cat((text, text)), 3.0, schedule=EXACT)
    assert relative(same, plain) < 1e-5
    slightly, strongly = (sample(model, noise, both, weight, schedule=EXACT)[0] for weight in (1e-6, 3.0))
    assert relative(slightly, plain) < 1e-4 < 1e-2 < relative(strongly, plain)


@pytest.mark.parametrize("given", range(1, FRAMES))
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_given_frames_stay_and_are_continued(setting: Setting, given: int, guidance: float) -> None:
    """Whatever frames are given come back bit by bit; given the clip's own first frames, the clip itself comes out."""
    model, noise, text, both = setting
    states = both if guidance else text
    whole, _ = sample(model, noise, states, guidance, schedule=EXACT)
    found, report = sample(model, noise, states, guidance, prefix_BFChw=whole[:, :given], schedule=EXACT)
    assert torch.equal(found[:, :given], whole[:, :given])
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=0)
    assert report["deep"].passes == (FRAMES - given) * 8
    other = torch.randn_like(whole[:, :given])
    changed, _ = sample(model, noise, states, guidance, prefix_BFChw=other)
    assert torch.equal(changed[:, :given], other)
    assert relative(changed[:, given:], whole[:, given:]) > 1e-3


def test_a_frame_does_not_know_of_later_noise_nor_of_its_batch(setting: Setting) -> None:
    model, noise, _, both = setting
    wanted, _ = sample(model, noise, both, 2.5, schedule=EXACT)
    first, _ = sample(model, noise[:, :2], both, 2.5, schedule=EXACT)
    torch.testing.assert_close(first, wanted[:, :2], atol=1e-4, rtol=0)
    alone, _ = sample(model, noise[1:], both[1::2], 2.5, schedule=EXACT)
    torch.testing.assert_close(alone, wanted[1:], atol=1e-4, rtol=0)


def by_hand(setting: Setting, noise: Tensor, guidance: float, window: int, context: int, later: Tensor | None) -> Tensor:
    """Token after token by the uncached forward pass; each later window is text, the last `context` frames, new frames."""
    model, block = setting.model, setting.model.deep_block
    z, places = order(to_tokens(noise), block), noise.shape[3] * noise.shape[4]
    done = z[:, :0]

    def next_parameters(tokens: Tensor, states: Tensor) -> Affine:
        table = model.rotary(torch.arange(-states.shape[1], tokens.shape[1] + 1), SIZE, text=True)
        found = block.affine(torch.cat((tokens, tokens[:, :1] * 0), 1), table, states)
        return Affine(found.shift[:, -1:], found.scale[:, -1:])

    while done.shape[1] < z.shape[1]:
        known = done[:, -context:] if done.shape[1] >= window else done
        states = setting.both if later is None or not done.shape[1] else later
        part = z[:, done.shape[1] - known.shape[1] :][:, :window]
        tokens = known.flatten(1, 2)
        for t in range(tokens.shape[1], part.shape[1] * places):
            branches = [next_parameters(tokens, text) for text in states.chunk(2)]
            tokens = torch.cat((tokens, guide(*branches, guidance).inverse(part.flatten(1, 2)[:, t : t + 1])), 1)
        done = torch.cat((done, tokens.unflatten(1, (-1, places))[:, known.shape[1] :]), 1)
    x = order(done, block).flatten(0, 1)
    for shallow in reversed(model.shallow_blocks):
        u, x = order(x[:, None], shallow)[:, 0], x[:, :0]
        for t in range(places):
            table = model.rotary(torch.arange(t + 1), SIZE, text=False)
            found = shallow.affine(torch.cat((x, u[:, :1] * 0), 1), table, None)
            x = torch.cat((x, Affine(found.shift[:, -1:], found.scale[:, -1:]).inverse(u[:, t : t + 1])), 1)
        x = order(x[:, None], shallow)[:, 0]
    return from_tokens(x.unflatten(0, noise.shape[:2]), *SIZE)


@pytest.mark.parametrize(("window", "context", "own_text"), [(3, 2, False), (3, 1, True), (2, 1, False), (5, 2, False)])
@torch.no_grad()
def test_longer_than_the_window(setting: Setting, window: int, context: int, own_text: bool) -> None:
    noise = torch.randn(1, 6, 8, *SIZE)
    one = setting._replace(both=setting.both[::2])
    later = setting.both[1::2] + 1 if own_text else None
    wanted = by_hand(one, noise, 2.5, window, context, later)
    for schedule in (SEQUENTIAL, EXACT):
        texts = one.both if later is None else [(0, one.both), (window, later)]
        found, _ = sample(setting.model, noise, texts, 2.5, window=window, context=context, schedule=schedule)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_given_frames_beyond_the_window(setting: Setting) -> None:
    """A clip that is longer than the window already is continued from its last frames."""
    model, noise, text, _ = setting
    whole, _ = sample(model, noise, text, window=2, context=1, schedule=EXACT)
    for given in (1, 2, 3):
        found, _ = sample(model, noise, text, prefix_BFChw=whole[:, :given], window=2, context=1, schedule=EXACT)
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=0)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, Schedule()], ids=["sequential", "jacobi"])
@pytest.mark.parametrize("given", [0, 3])
def test_progress_counts_every_token_of_every_block(setting: Setting, schedule: Schedule, given: int) -> None:
    counted: list[int] = []
    prefix = torch.randn(2, given, 8, *SIZE) if given else None
    settings: Settings = {"window": 3, "context": 2, "schedule": schedule, "progress": counted.append}
    sample(setting.model, setting.noise, setting.text, 0.0, prefix, **settings)
    assert sum(counted) == 2 * 6 * (FRAMES - given) * 8
    assert min(counted) > 0


def test_context_follows_the_reference() -> None:
    assert [default_context(window) for window in (21, 9, 4, 2, 1)] == [16, 7, 3, 1, 1]


def test_settings_that_are_not_usable(setting: Setting) -> None:
    model, noise, text, both = setting
    for guidance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance .* is not usable"):
            sample(model, noise, both, guidance)
    for context in (0, 2):
        with pytest.raises(ValueError, match=rf"context of {context} frames does not fit the window of 2; give 1 … 1"):
            sample(model, noise, text, window=2, context=context)
    with pytest.raises(ValueError, match="4 of 4 latent frames are given; nothing is left"):
        sample(model, noise, text, prefix_BFChw=noise)
    for states, guidance in ((None, 0.0), (text, 1.0), (both, 0.0), (text[:1], 0.0)):
        with pytest.raises(ValueError, match=f"{0 if states is None else len(states)} text states for 2 clips at guidance {guidance:g}"):
            sample(model, noise, states, guidance)
    for wrong in ({"sampler": "newton"}, {"tolerance": -1.0}, {"tolerance": float("nan")}, {"tolerance": 0.2}, {"window": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))}"):
            Schedule(**wrong)

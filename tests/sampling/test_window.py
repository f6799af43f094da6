"""The sliding window beyond what the foundation's tests ask: batches, no waiting for the device, certificates, streams, rings.

Shapes: B clips, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reelflow.config import FlowConfig
from reelflow.denoise import denoise, denoise_frames
from reelflow.evaluation.golden import load
from reelflow.flow import StarFlow
from reelflow.flow.attention import causal
from reelflow.flow.rope import positions
from reelflow.sampling import Report, Schedule, Settings, certify, sample, stream
from reelflow.sampling.conditioner import Conditioner, Ring
from reelflow.sampling.deep import windows
from reelflow.sampling.replay import Replay
from reelflow.sampling.schedules import Solver, silent

EXACT = Schedule(tolerance=0.0)


class Setting(NamedTuple):
    """The video model of the golden vectors (window 5) on 7 frames of 2 × 4 places."""

    model: StarFlow
    noise: Tensor
    text: Tensor
    both: Tensor


@pytest.fixture(scope="module")
def setting(golden: Path) -> Setting:
    found = load(golden / "starflow_v_mini")
    noise = torch.randn(2, 7, 8, 2, 4, generator=torch.Generator().manual_seed(5))
    text = found.inputs["text"]
    return Setting(found.model.requires_grad_(False), noise, text, torch.cat((text, found.inputs["text_null"])))


def close(found: Tensor, wanted: Tensor, bound: float = 2e-4) -> None:
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)


# --- the window


def test_neither_window_nor_batch_changes_the_sample(setting: Setting) -> None:
    """Every clip has its own position: what the others of its batch need does not matter to it, nor how much is tried at once."""
    model, noise, _, both = setting
    for tolerance, bound in ((0.0, 2e-4), (1e-4, 2e-3)):
        wanted, _ = sample(model, noise[:, :4], both, 2.0, schedule=Schedule(tolerance=tolerance, window=8))
        for window in (1, 3, 5):
            close(sample(model, noise[:, :4], both, 2.0, schedule=Schedule(tolerance=tolerance, window=window))[0], wanted, bound)
        alone = sample(model, noise[1:, :4], both[1::2], 2.0, schedule=Schedule(tolerance=tolerance))[0]
        close(alone, wanted[1:], bound)


def test_clips_of_a_batch_do_not_wait_for_each_other(setting: Setting) -> None:
    """A batch takes as many passes as its slowest clip takes alone, not as many as if all settled together."""
    model, noise, text, _ = setting
    passes = [sample(model, noise[i : i + 1, :4], text[i : i + 1])[1]["deep"].passes for i in range(2)]
    assert sample(model, noise[:, :4], text)[1]["deep"].passes <= max(passes) + 1


def test_a_pass_never_asks_the_device(setting: Setting) -> None:
    """With fake tensors nothing has a value: one look of the host at the device would fail. Shapes stay the same pass after pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        model = StarFlow(setting.model.config)
        solver = Solver("deep block", model.deep_block, torch.randn(2, 24, 8), 8, Schedule(window=6), silent)
        reader = Conditioner(model, model.deep_block, 2, (2, 4), 24 + solver.window, 1.5)
        reader.read_text(torch.randn(4, model.config.text_tokens, model.config.text_dim))
        shapes = {name: value.shape for name, value in vars(solver).items() if isinstance(value, Tensor)}
        for _ in range(3):
            solver.slide(reader, 6, 30)
        assert shapes == {name: value.shape for name, value in vars(solver).items() if isinstance(value, Tensor)}


def test_passes_beyond_the_end_change_nothing(setting: Setting) -> None:
    """So that a device may be some passes ahead of the host."""
    model, _, text, _ = setting
    solver = Solver("deep block", model.deep_block, torch.randn(1, 16, 8), 8, Schedule(window=6), silent)
    reader = Conditioner(model, model.deep_block, 1, (2, 4), 16 + solver.window)
    with torch.no_grad():
        reader.read_text(text[:1])
        solver.solve(reader, 0, 16, 16)
        wanted, report = solver.tokens(0, 16).clone(), solver.report
        for _ in range(3):
            solver.slide(reader, 6, 22)
    assert torch.equal(solver.tokens(0, 16), wanted)
    assert solver.report.residual == report.residual


def test_several_passes_between_two_looks_are_recorded_once_per_frame(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, here: the host looks after every eighth pass, and passes of a key are the first of them again and again."""
    model, noise, _, both = setting
    options: Settings = {"window": 3, "context": 2, "schedule": EXACT}
    wanted, _ = sample(model, noise, both, 2.0, **options)
    begin, recorded = Solver.begin, dict[Any, Any]()

    def look_seldom(solver: Solver, z_BNC: Tensor) -> None:
        begin(solver, z_BNC)
        solver.every = 8

    def replay(self: Replay, key: Any, run: Any) -> None:
        recorded.setdefault((self, key), run)()

    monkeypatch.setattr(Solver, "begin", look_seldom)
    monkeypatch.setattr(Replay, "__call__", replay)
    close(sample(model, noise, both, 2.0, **options)[0], wanted)
    solvers = {replay for replay, _ in recorded}
    assert len(solvers) == 1 + 2 * (len(model.config.layers) - 1), "the shallow blocks take 3 frames, then the 2 that are left"
    assert len(recorded) <= (len(solvers) - 1) + 4, "one for a shallow block, one per frame that the deep block's keys end in"


@pytest.mark.gpu
def test_replayed_passes_are_the_passes(setting: Setting, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    model, noise, both = (thing.to(device) for thing in (copy.deepcopy(setting.model), setting.noise, setting.both))
    found, _ = sample(model, noise, both, 2.0, schedule=EXACT)
    monkeypatch.setattr(Replay, "__call__", lambda self, key, run: run())
    close(found, sample(model, noise, both, 2.0, schedule=EXACT)[0], 1e-6)
    close(found.cpu(), sample(setting.model, setting.noise, setting.both, 2.0, schedule=EXACT)[0], 1e-3)


def test_a_pass_with_values_that_are_not_finite_names_block_and_frame(setting: Setting) -> None:
    model, noise, text, _ = setting
    broken = noise[:, :3].clone()
    broken[0, 1, 0, 0, 0] = float("nan")
    for schedule in (Schedule(), EXACT, Schedule("sequential")):
        with pytest.raises(ValueError, match=r"deep block, latent frame 1: values are not finite; use precision float32"):
            sample(model, broken, text, schedule=schedule)


# --- certificates


@pytest.mark.parametrize("options", [{}, {"window": 3, "context": 2}, {"window": 3, "ring": True}], ids=["whole", "windows", "ring"])
@pytest.mark.parametrize("given", [0, 2])
def test_a_sample_gives_its_noise_back_and_another_one_does_not(setting: Setting, options: Settings, given: int) -> None:
    model, noise, _, both = setting
    prefix = torch.randn_like(noise[:, :given]) if given else None
    residuals = []
    for tolerance in (0.0, 1e-4, 1e-2):
        found, _ = sample(model, noise, both, 2.0, prefix, schedule=Schedule(tolerance=tolerance), **options)
        residuals.append(certify(model, found, noise, both, 2.0, given, **options).largest)
    assert residuals[0] < 1e-3
    assert residuals == sorted(residuals)
    found[:, -1, 0, 0, 0] += 1
    assert certify(model, found, noise, both, 2.0, given, **options).largest > 0.05


# --- streams


@pytest.mark.parametrize("options", [{}, {"window": 3, "context": 2}, {"window": 3, "ring": True}], ids=["whole", "windows", "ring"])
@pytest.mark.parametrize("given", [0, 2])
def test_a_stream_is_the_sample_frame_by_frame(setting: Setting, options: Settings, given: int) -> None:
    model, noise, _, both = setting
    prefix = torch.randn_like(noise[:, :given]) if given else None
    wanted, reports = sample(model, noise, both, 2.0, prefix, schedule=EXACT, **options)
    streamed: dict[str, Report] = {}
    found = list(stream(model, noise, both, 2.0, prefix, streamed, schedule=EXACT, **options))
    close(torch.stack(found, 1), wanted)
    assert streamed["deep"].passes == reports["deep"].passes


def test_a_frame_leaves_before_the_next_one_is_begun(setting: Setting) -> None:
    model, noise, text, _ = setting
    done: list[int] = []
    frames = stream(model, noise[:1], text[:1], progress=done.append, schedule=Schedule("sequential"))
    next(frames)
    assert sum(done) == 6 * 8
    next(frames)
    assert sum(done) == 2 * 6 * 8


def test_who_stops_a_stream_leaves_nothing_behind(setting: Setting) -> None:
    model, noise, text, _ = setting
    frames = stream(model, noise, text)
    assert next(frames).grad_fn is None
    assert torch.is_grad_enabled(), "the stream's own mode is not the consumer's"
    alive = [weakref.ref(thing) for thing in gc.get_objects() if isinstance(thing, Solver | Conditioner)]
    assert alive
    frames.close()
    gc.collect()
    assert not any(thing() for thing in alive)


# --- texts that change, windows


def test_windows_begin_with_a_text_and_where_the_trained_length_ends() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert [window[:3] for window in windows(9, 0, 5, 3, [(0, a)])] == [(0, 0, 5), (2, 5, 7), (4, 7, 9)]
    found = windows(9, 0, 5, 3, [(0, a), (2, b)])
    assert [window[:3] for window in found] == [(0, 0, 2), (0, 2, 5), (2, 5, 7), (4, 7, 9)]
    assert [window.text is b for window in found] == [False, True, True, True]
    assert [window[:3] for window in windows(9, 6, 5, 3, [(0, a), (8, b)])] == [(3, 6, 8), (5, 8, 9)]


def test_another_text_is_read_from_its_frame_on(setting: Setting) -> None:
    """Up to there nothing changes; from there on it is the clip so far, continued under the other text."""
    model, noise, text, _ = setting
    other = text + 1
    plain, _ = sample(model, noise[:, :5], text, schedule=EXACT)
    found, _ = sample(model, noise[:, :5], [(0, text), (2, other)], schedule=EXACT)
    close(found[:, :2], plain[:, :2])
    assert (found[:, 2:] - plain[:, 2:]).abs().max() > 1e-2
    close(found, sample(model, noise[:, :5], other, prefix_BFChw=found[:, :2], schedule=EXACT)[0])


# --- rings


def test_a_ring_that_holds_the_video_changes_nothing(setting: Setting) -> None:
    model, noise, _, both = setting
    wanted, _ = sample(model, noise, both, 2.0, window=7, schedule=EXACT)
    close(sample(model, noise, both, 2.0, window=7, ring=True, schedule=EXACT)[0], wanted)


def test_a_ring_is_of_constant_size_and_near_the_exact_video(setting: Setting) -> None:
    """Beyond its frames it is an approximation: nearer to the exact continuation than a model that saw another past."""
    model, noise, text, _ = setting
    exact, _ = sample(model, noise, text, window=5, context=4, schedule=EXACT)
    ring, _ = sample(model, noise, text, window=5, ring=True, schedule=EXACT)
    close(ring[:, :5], exact[:, :5])
    difference = (ring - exact)[:, 5:].square().mean().sqrt()
    assert 1e-6 < difference < 0.5 * exact[:, 5:].std()
    assert Ring(model, model.deep_block, 1, (2, 4), 4).cache.slots == model.config.text_tokens + 1 + 6 * 8


def test_text_and_start_token_go_along_with_the_ring(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, where keys depend on nothing but tokens and positions: frame 4 of a ring of 2 frames is the attention over
    text and start token moved on by 2 frames, and frames 2 … 4 where they are.
    """
    config = setting.model.config.model_copy(update={"layers": (1,), "denoiser": None})
    torch.manual_seed(1)
    model, tokens, text = StarFlow(config), torch.randn(1, 5 * 8, 8), setting.text[:1]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block, words = model.deep_block, text.shape[1]

    @torch.no_grad()
    def last_frame() -> Tensor:
        ring = Ring(model, block, 1, (2, 4), 2)
        ring.read_text(text)
        return [ring(tokens[:, at : at + 8], torch.arange(at, at + 8)[None], 40).shift for at in range(0, 40, 8)][-1]

    with torch.no_grad():
        place = torch.cat((torch.arange(-words, 1), torch.arange(16, 40)))
        where = positions(place, 2, 4, config.position_span, words)
        where[: words + 1, 2] += 2
        hidden = torch.cat((block.proj_text(text), block.proj_in(tokens[:, :1]), block.proj_in(tokens[:, 16:])), 1)
        wanted = block.read(block.run(hidden, model.rotation(where), [causal])).shift[:, -8:]
    close(last_frame(), wanted, 1e-5)
    monkeypatch.setattr(Ring, "_turn", lambda self, first_B1: None)
    assert (last_frame() - wanted).abs().max() > 1e-4


# --- the denoiser's wavefront


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
@pytest.mark.parametrize("layers", ["first", "all"])
def test_denoising_frame_by_frame_is_denoising(setting: Setting, frames: int, layers: Any) -> None:
    model, _, text, _ = setting
    assert model.config.denoiser is not None
    config = model.config.model_copy(
        update={"denoiser": model.config.denoiser.model_copy(update={"look_ahead_layers": layers, "window": 2})}
    )
    one = StarFlow(config).requires_grad_(False)
    one.load_state_dict(model.state_dict())
    x = torch.randn(2, frames, 8, 2, 4)
    wanted = denoise(one, x, text)
    close(torch.stack(list(denoise_frames(one, x.unbind(1), lambda frame: text)), 1), wanted, 1e-5)


def test_one_layer_of_look_ahead_is_one_frame_of_delay(setting: Setting) -> None:
    model, _, text, _ = setting
    assert model.config.denoiser is not None
    taken: list[int] = []

    def delay(look_ahead_layers: str) -> int:
        about = model.config.denoiser.model_copy(update={"look_ahead_layers": look_ahead_layers})  # type: ignore[union-attr]
        one = StarFlow(model.config.model_copy(update={"denoiser": about})).requires_grad_(False)
        taken.clear()
        next(denoise_frames(one, (taken.append(i) or torch.randn(2, 8, 2, 4) for i in range(5)), lambda frame: text))  # type: ignore[func-returns-value]
        return len(taken) - 1

    assert delay("first") == 1
    assert delay("all") == min(model.config.denoiser.layers, 4)


def test_without_a_denoiser_there_is_no_stream_of_clean_frames() -> None:
    model = StarFlow(FlowConfig(channels=2, width=16, deep_width=16, layers=(1, 1), head_dim=16, position_span=4))
    with pytest.raises(ValueError, match="no learned denoiser, and a Tweedie step reads the whole video"):
        next(denoise_frames(model, [torch.randn(1, 2, 2, 2)], lambda frame: None))

"""Stable Video Diffusion within a memory budget: what is counted is what is held, and every way gives the same clip."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import reelflow
from reelflow.pipelines.account import RESERVE
from reelflow.pipelines.base import silent
from reelflow.pipelines.loading import Asked as Wanted
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.pipelines.svd import blocks as svd_blocks
from reelflow.pipelines.svd import budget as svd_budget
from reelflow.pipelines.svd.blocks import Care, caring
from reelflow.pipelines.svd.budget import STAGES, Account, Asked, Plan, Way, choose
from reelflow.pipelines.trial import Peak

second = runpy.run_path(str(Path(__file__).with_name("second_device.py")))
tiny = runpy.run_path(str(Path(__file__).with_name("svd_tiny.py")))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny-svd")


@pytest.fixture(scope="module")
def svd() -> SvdPipeline:
    return SvdPipeline(tiny["tiny_parts"]())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small beside the tiny clips as real ones are beside real clips."""
    for module in (svd_blocks, svd_budget):
        monkeypatch.setattr(module, "CPU_PIECE", 2**18)
    monkeypatch.setattr(svd_budget, "PIECE", 2**19)
    monkeypatch.setattr(svd_budget, "THRIFTY_PIECE", 2**17)


def picture(side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("reuse", [1, 2])
def test_thrift_changes_nothing_but_rounding(svd: SvdPipeline, guidance: float, reuse: int) -> None:
    latents, how = torch.randn(1, 4, 4, 8, 8), svd._settled(Diffusion(steps=3, guidance=guidance, reuse=reuse))
    shown, states = torch.randn(1, 4, 8, 8), torch.randn(1, tiny["STATES"])
    made = []
    for care in (Care(), Care(again=True), Care(2**12, True)):
        with torch.no_grad(), caring(care):
            made.append(svd._denoise(latents.clone(), shown, states, how, silent))
            made[-1] = made[-1], svd.decoder(made[-1] / 10)
    for sampled, decoded in made[1:]:
        assert (sampled - made[0][0]).abs().max() < 1e-4 * made[0][0].abs().max()
        assert (decoded - made[0][1]).abs().max() < 1e-4


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("way", [Way(), Way(thrifty=True)])
def test_what_is_counted_is_what_is_held(svd: SvdPipeline, way: Way) -> None:
    """Against the tensors of a real run, in each stage."""
    account, asked = Account(svd, "cpu"), Asked(4, 128, 64, True)
    held, how = {}, svd._settled(Diffusion(steps=1, guidance=3.0))
    told = torch.zeros(1, 4, 16, 8), torch.zeros(1, tiny["STATES"])
    runs = {
        "encoding": lambda: svd.encoder(torch.zeros(1, 3, 128, 64)),
        "sampling": lambda: svd._denoise(torch.zeros(1, 4, 4, 16, 8), *told, how, silent),
        "decoding": lambda: svd.decoder(torch.zeros(1, 4, 4, 16, 8)),
    }
    for stage, run in runs.items():
        with torch.no_grad(), caring(way.care("cpu")), Peak() as peak:
            run()
        held[stage] = peak.most
    for stage, most in held.items():
        counted = account.work(stage, way, asked)
        assert most <= counted * 1.02, stage
        assert counted < most * 1.3 + 100_000, stage


@pytest.mark.usefixtures("small_pieces")
def test_thrift_and_turns_need_less(svd: SvdPipeline) -> None:
    account, asked = Account(svd, "cuda"), Asked(4, 128, 64, True)
    plain, turned, tight = (account.need(way, asked) for way in (Way(), Way(turns=True), Way(turns=True, thrifty=True)))
    assert plain > turned > tight > RESERVE["cuda"]
    loose, close = Way(), Way(thrifty=True)
    assert account.work("decoding", close, asked) < 0.85 * account.work("decoding", loose, asked)
    assert account.work("sampling", close, asked) < 0.7 * account.work("sampling", loose, asked)
    assert account.need(Way(), Asked(2, 128, 64, True)) < plain


def test_the_first_way_that_fits_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sizes that are quicker to count than the real ones."""

    def work(self: Account, stage: str, way: Way, asked: Asked) -> int:
        size = self.pipe.decoder.conv_out.weight.element_size() * asked.frames * asked.height * asked.width
        return size * (4 if stage == "decoding" else 2) // (2 if way.thrifty else 1)

    monkeypatch.setattr(Account, "work", work)
    load = lambda name: SvdPipeline.load(folder, "cpu", name)  # noqa: E731
    wanted, names, cuda = Wanted(frames=4, size=(128, 64)), ["float32", "bfloat16"], torch.device("cuda")
    first = choose(load, names, cuda, 10**12, wanted)
    assert (first.precision, first.way, first.asked) == ("float32", Way(), Asked(4, 64, 128, True))
    turned = choose(load, names, cuda, first.account.need(Way(), first.asked) - 1, wanted)
    assert (turned.precision, turned.way.turns) == ("float32", True)
    least = turned.account.need(Way(turns=True, thrifty=True), first.asked)
    half = choose(load, names, cuda, least - 1, wanted)
    assert half.precision == "bfloat16"
    assert str(half).startswith("memory: bfloat16")
    with pytest.raises(ValueError, match=r"budget 1GB is too small: 4 frames of 128 × 64 with guidance need at least .* in float32;"):
        choose(load, ["float32"], cuda, 10**9, wanted)


def test_a_budget_is_said_kept_and_stored(folder: Path) -> None:
    plain = reelflow.load(folder, "cpu").animate(picture(), seed=1, frames=3, sampling=Diffusion(steps=2))
    with pytest.warns(UserWarning, match=r"memory: float32; .* of 4GB"):
        pipe = reelflow.load(folder, "cpu", memory_budget="4GB", clip=Wanted(frames=3))
    assert isinstance(pipe, SvdPipeline)
    clip = pipe.animate(picture(), seed=1, frames=3, sampling=Diffusion(steps=2))
    assert np.array_equal(clip.frames, plain.frames)
    memory = clip.metadata["memory"]
    assert memory["budget"] == 4 * 10**9
    assert memory["counted"].keys() == {"embedding", "encoding", "sampling", "decoding"}
    json.dumps(memory)
    with pytest.raises(ValueError, match="tiny-svd: compile does not go with a memory budget"):
        pipe.compile()
    assert pipe.plan is not None
    pipe.plan = type(pipe.plan)(pipe.plan.account, RESERVE["cpu"] + 15_000_000, "float32", CPU, Way(), pipe.plan.asked)
    with pytest.raises(ValueError, match=r"memory budget 715MB: 4 frames of 192 × 192 with guidance need .* as the model was loaded"):
        pipe.animate(picture(), seed=1, frames=4, size=(192, 192), sampling=Diffusion(steps=2))


@pytest.mark.parametrize("way", [Way(turns=True), Way(turns=True, thrifty=True), Way()])
def test_parts_are_on_the_device_while_they_are_used(folder: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second device, imitated: nothing runs over both, each stage holds what was counted, and nothing stays there."""
    make = lambda pipe: pipe.animate(picture(), seed=1, frames=3, sampling=Diffusion(steps=2))  # noqa: E731
    pipe = SvdPipeline.load(folder, "cpu")
    plain = make(pipe)
    account = Account(pipe, "mps")
    plan = pipe.plan = Plan(account, 10**12, "float32", second["NAME"], way, Asked(3, 64, 64, True))
    counted, held, use = account.stages(way, plan.asked), {}, Plan.use
    with second["SecondDevice"]() as device:
        pipe.device = second["NAME"]
        plan.settle(pipe)

        @contextmanager
        def used(self: Plan, part: str) -> Iterator[None]:
            device.most = device.live
            with use(self, part):
                yield
                held[part] = device.most

        monkeypatch.setattr(Plan, "use", used)
        clip = make(pipe)
        left = device.live
    assert np.abs(clip.frames.astype(int) - plain.frames).max() <= 1
    for stage, part in STAGES.items():
        assert 0 < held[part] <= counted[stage] - RESERVE["cuda"] + 200_000, stage
    assert (left < 10_000) == way.turns


def test_precisions_it_does_not_come_in(folder: Path) -> None:
    with pytest.raises(ValueError, match="models of this family come in float32 and bfloat16, not in int8"):
        reelflow.load(folder, "cpu", "int8")

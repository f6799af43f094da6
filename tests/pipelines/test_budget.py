"""Memory budgets: sizes in words, the order of the ways, and the account against what is really held, on an imitated second device."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reelflow
from reelflow import Clip
from reelflow.config import FlowConfig
from reelflow.flow import KVCache
from reelflow.flow.parallel import Ranks
from reelflow.pipelines import account as accounts
from reelflow.pipelines import budget, loading
from reelflow.pipelines.account import RESERVE, Account, Way, Wish
from reelflow.pipelines.budget import Plan, choose, parse, ways, words
from reelflow.pipelines.loading import Asked
from reelflow.pipelines.offload import ByteCache, HostCache, Parts
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline
from reelflow.pipelines.trial import Peak, Trial

second = runpy.run_path(str(Path(__file__).with_name("second_device.py")))
SecondDevice, watched = second["SecondDevice"], second["watched"]

PROMPT = "a red ball moves right on a black background"
CARRIED = 60_000
"""Bytes of text states and latents that go from stage to stage; the reserve's, for there they are nothing."""


# Sizes in words


@given(size=st.integers(1, 10**6), unit=st.sampled_from(sorted(budget.UNITS)), space=st.sampled_from(["", " "]))
def test_sizes(size: int, unit: str, space: str) -> None:
    assert parse(f"{size}{space}{unit.lower()}") == parse(f" {size}{unit} ") == size * budget.UNITS[unit]
    assert parse(f"{size}.5{unit}") == size * budget.UNITS[unit] + budget.UNITS[unit] // 2


def test_sizes_that_are_none() -> None:
    for text in ("24", "", "GB", "24 parsecs", "24KB", "0GB", "0.0000001MB", "-8GB", "1e3GB", "nanGB", "9" * 400 + "GB", "8GB, please"):
        with pytest.raises(ValueError, match="give a number above 0 with its unit: 24GB") as error:
            parse(text)
        assert repr(text) in str(error.value)


@given(st.integers(1, 10**13))
def test_a_size_that_is_said_is_enough(size: int) -> None:
    assert size <= parse(words(size)) <= size * 1.01 + 10**6


# The order


def order(*found: str, turned: tuple[bool, ...]) -> list[Way]:
    """Of "precision layers cache": each first with all that may stay, then in turns, and at last with a smaller codec."""
    return [
        Way(*way.split(), turns=turns, codec=codec)
        for way in found
        for turns, codec in [*((turns, "float32") for turns in turned), (turned[-1], "bfloat16")]
    ]


def test_ways_of_a_gpu_are_in_order() -> None:
    wish = Wish(3, 4, 4, guidance=True)
    assert list(ways("bfloat16", True, "cuda", wish)) == order(
        "bfloat16 device whole", "bfloat16 device bytes", "int8 device whole", "int8 device bytes", "int4 device whole",
        "int4 device bytes", "bfloat16 device host", "bfloat16 host host", "int8 device host", "int4 device host", turned=(False, True),
    )  # fmt: skip
    assert list(ways("bfloat16", False, "cuda", wish)) == order(
        "bfloat16 device whole", "bfloat16 device host", "bfloat16 host host", "bfloat16 device bytes", turned=(False, True)
    )
    assert list(ways("int4", False, "cuda", wish)) == order(
        "int4 device whole", "int4 device bytes", "int4 device host", turned=(False, True)
    )


def test_ways_of_a_cpu_keep_everything_there() -> None:
    wish = Wish(3, 4, 4, guidance=True)
    assert list(ways("float32", True, "cpu", wish)) == order(
        "float32 device whole", "float32 device bytes", "bfloat16 device whole", "bfloat16 device bytes", "int8 device whole",
        "int8 device bytes", "int4 device whole", "int4 device bytes", turned=(False,),
    )  # fmt: skip
    ring = list(ways("bfloat16", True, "cuda", Wish(3, 4, 4, guidance=True, ring=True)))
    assert {way.cache for way in ring} == {"whole"}
    assert {way.precision for way in ring} == {"bfloat16", "int8", "int4"}


# The choice


@pytest.fixture(scope="module")
def plan(tiny_model: Path) -> Plan:
    """Of a budget that nothing has to be given up for."""
    with pytest.warns(UserWarning, match="memory: float32; "):
        pipe = reelflow.load(tiny_model, "cpu", memory_budget="4GB")
    assert isinstance(pipe, StarFlowPipeline)
    assert pipe.plan is not None
    return pipe.plan


@pytest.fixture(scope="module")
def large(plan: Plan) -> Account:
    """For a GPU, of a model whose parts are worth counting; no value of it is ever made."""
    sizes = {"width": 1024, "deep_width": 1024, "layers": (2, 2, 24), "window": 21}
    return Account(plan.account.config.model_copy(update=sizes), plan.account.codec, plan.account.text, "cuda")


LONG = Wish(21, 16, 16, guidance=True)


def test_the_first_way_that_fits_is_picked(large: Account) -> None:
    found = list(ways("bfloat16", True, "cuda", LONG))
    needs = {way: large.need(way, LONG) for way in found}
    picked = []
    for size in sorted({*needs.values()}, reverse=True):
        way = choose(large, LONG, size, found, None).way
        assert needs[way] <= size
        assert all(needs[better] > size for better in found[: found.index(way)])
        picked.append(found.index(way))
    assert picked == sorted(picked)
    assert len(set(picked)) > 5


def test_a_budget_nothing_fits_in_is_told_the_least_that_does(large: Account) -> None:
    found = list(ways("bfloat16", True, "cuda", LONG))
    with pytest.raises(ValueError, match=r"memory budget 1MB is too small: 81 frames of 256 × 256 with guidance needs at least") as error:
        choose(large, LONG, parse("1MB"), found, None)
    least = parse(str(error.value).split("at least ")[1].split(" in ")[0])
    assert str(error.value).endswith("give that, or a shorter clip, or guidance 0")
    assert 0.99 * least <= choose(large, LONG, least, found, None).need <= least
    with pytest.raises(ValueError, match="too small"):
        choose(large, LONG, int(0.985 * least), found, None)


def test_what_the_host_cannot_hold_is_not_picked(large: Account) -> None:
    found = [Way("bfloat16"), Way("bfloat16", "host", "host")]
    device, host = large.need(found[1], LONG), large.host(found[1], LONG)
    assert choose(large, LONG, device, found, host).way == found[1]
    with pytest.raises(ValueError, match="too small"):
        choose(large, LONG, device, found, host - 1)


def test_a_stream_beyond_the_window_reads_the_next_one_meanwhile(large: Account) -> None:
    for cache in ("whole", "bytes"):
        way = Way("bfloat16", cache=cache)
        once, twice = (large.cache(way, Wish(frames, 16, 16, guidance=True, stream=True))[0] for frames in (21, 22))
        assert twice == 2 * once


def test_a_longer_clip_than_was_planned_does_not_fit(large: Account) -> None:
    way = Way("bfloat16", cache="bytes")
    plan = Plan(large, large.need(way, LONG), way, LONG)
    plan.check((1, 21, 8, 16, 16), 1.5)
    with pytest.raises(ValueError, match="597 frames of 256 × 256 with guidance needs .* as the model was loaded; give that, or a shorter"):
        plan.check((1, 150, 8, 16, 16), 1.5)
    with pytest.raises(ValueError, match="a ring needs the whole cache on the device; leave it out, or give more memory"):
        plan.check((1, 21, 8, 16, 16), 1.5, ring=True)


def test_another_precision_is_advised_where_one_was_asked_for(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="in float32; give that, or a shorter clip, or guidance 0, or another precision"):
        reelflow.load(tiny_model, "cpu", "float32", memory_budget="1MB")


def test_a_gradient_step_has_its_layers_on_the_device(plan: Plan, tiny_model: Path) -> None:
    """Tweedie's step goes back through layers that would be gone."""
    config = plan.account.config.model_copy(update={"denoiser": None})
    with torch.device("meta"):
        flow = reelflow.flow.StarFlow(config)
    for denoise in (True, False):
        found = budget.possible("float32", torch.device("mps"), flow, Wish(3, 4, 4, guidance=True, denoise=denoise))
        assert any(way.layers == "host" for way in found) is not denoise


# The account against what is held


TRIALS: dict[Any, Trial] = {}


def trial(config: FlowConfig, codec: Any, text: Any, device: str) -> Trial:
    """One for all tests: the model is the same."""
    return TRIALS.setdefault((config, device), Trial(config, codec, text, device))


@pytest.fixture(autouse=True)
def _one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "Trial", trial)


def loaded(folder: Path, way: Way, monkeypatch: pytest.MonkeyPatch, device: str = "mps", **asked: Any) -> StarFlowPipeline:
    """A pipeline that runs in that way."""
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(budget, "choose", lambda account, wish, size, found, host: Plan(account, 10**12, way, wish))
        pipe = reelflow.load(folder, device, memory_budget="1TB", clip=Asked(**asked))
    assert isinstance(pipe, StarFlowPipeline)
    return pipe


STAGES = {"text": ("text",), "flow": ("sample", "stream", "read"), "denoiser": ("denoise",), "codec": ("encode", "decode")}
"""What the first part that is used is used for."""


def held(
    pipe: StarFlowPipeline, device: Any, make: Callable[[StarFlowPipeline], Any], wish: Wish | None = None
) -> dict[str, tuple[int, int]]:
    """For each part that is used: bytes that were on the device, and bytes counted without the reserve."""
    assert pipe.plan is not None
    most, counted = watched(pipe, device), pipe.plan.account.stages(pipe.plan.way, wish or pipe.plan.wish)
    make(pipe)
    return {part: (size, max(counted.get(stage, 0) for stage in STAGES[part]) - RESERVE["cuda"]) for part, size in most.items()}


def check(sizes: dict[str, tuple[int, int]], margin: float = 1.25) -> None:
    for part, (size, counted) in sizes.items():
        assert size <= counted + CARRIED, part
        assert counted <= margin * size + CARRIED, part


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Clip:
    with SecondDevice():
        return reelflow.load(tiny_model, "mps").generate(PROMPT, seed=3, frames=5)


WAYS = {
    "plain": Way("float32"),
    "all elsewhere": Way("float32", "host", "host", turns=True),
    "all smaller": Way("bfloat16", cache="bytes", codec="bfloat16"),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_account_is_what_is_held(name: str, tiny_model: Path, plain: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = []
    with SecondDevice() as device:
        pipe = loaded(tiny_model, WAYS[name], monkeypatch, frames=5)
        check(held(pipe, device, lambda pipe: clips.append(pipe.generate(PROMPT, seed=3, frames=5))))
    assert bool((clips[0].frames == plain.frames).all()) is (name != "all smaller")
    assert clips[0].metadata["memory"]["cache"] == WAYS[name].cache


OTHERS: dict[str, tuple[Asked, Callable[[StarFlowPipeline, Clip], Any]]] = {
    "longer stream": (Asked(frames=13, stream=True), lambda pipe, clip: list(pipe.stream(PROMPT, frames=13, seed=3))),
    "ring": (Asked(frames=13, ring=True), lambda pipe, clip: pipe.generate(PROMPT, frames=13, seed=3, sampling=Sampling(ring=True))),
    "edit": (Asked(task="edit", frames=5), lambda pipe, clip: pipe.edit(clip[:5], "make the box blue", seed=3)),
    "certified extension": (
        Asked(task="extend", seconds=1.6, certify=True),
        lambda pipe, clip: pipe.extend(clip, PROMPT, seconds=1.6, seed=3, sampling=Sampling(certify=True)),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_account_of_other_tasks(name: str, tiny_model: Path, source: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, make = OTHERS[name]
    with SecondDevice() as device:
        pipe = loaded(tiny_model, Way("float32", turns=True), monkeypatch, **vars(asked))
        check(held(pipe, device, lambda pipe: make(pipe, source)), margin=1.6)


def test_the_account_of_reading(tiny_model: Path, source: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    with SecondDevice() as device:
        pipe = loaded(tiny_model, Way("float32", "host", turns=True), monkeypatch)
        check(held(pipe, device, lambda pipe: pipe.score(source, PROMPT), Wish(3, 4, 4, False, read=True)), margin=1.6)


def test_the_account_of_eight_bits_on_a_cpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second device here: what torchao makes of the layers is weighed, and a real pass counted by the account's own counter."""
    pipe = loaded(tiny_model, Way("int8"), monkeypatch, "cpu")
    assert pipe.plan is not None
    own, flow = pipe.plan.account, pipe.flow
    packed = [getattr(p, name) for p in flow.parameters() for name in ("qdata", "scale", "zero_point") if hasattr(p, name)]
    rest = [p for p in flow.parameters() if not hasattr(p, "qdata")]
    weights = own.weights(Way("int8"))
    assert sum(x.nbytes for x in (*packed, *rest)) == weights["flow"] + weights["denoiser"]
    most = {}

    def counted(names: tuple[str, ...]) -> Any:
        peak = Peak()
        most[names[0]] = peak
        return peak

    pipe.use = lambda *names: counted(names)  # type: ignore[method-assign, assignment]
    pipe.generate(PROMPT, seed=3)
    stages = own.stages(Way("int8"), pipe.plan.wish)
    still = RESERVE["cpu"] + sum(weights.values())
    counts = {"flow": (most["flow"].most, stages["sample"] - still), "denoiser": (most["denoiser"].most, stages["denoise"] - still)}
    check(counts, margin=1.6)


FRESH = """
import sys, warnings, reelflow
from reelflow.evaluation.bench import resident
warnings.simplefilter("ignore")
pipe = reelflow.load(sys.argv[1], "cpu", memory_budget="4GB")
pipe.generate("a red ball", seed=0).save(sys.argv[2])
print(resident("VmHWM"), pipe.plan.need)
"""


@pytest.mark.slow
def test_a_fresh_process_keeps_within_the_account(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FRESH, str(tiny_model), str(tmp_path / "a.mp4")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    held, counted = map(int, done.stdout.split())
    assert held <= counted <= 2 * held


# What does not fit


def test_a_request_that_is_larger_than_planned_is_refused(tiny_model: Path, plan: Plan) -> None:
    with pytest.warns(UserWarning, match="memory: float32; "):
        pipe = reelflow.load(tiny_model, "cpu", "float32", memory_budget=f"{(plan.need + 1) / 1e6:f}MB")
    assert isinstance(pipe, StarFlowPipeline)
    assert len(pipe.generate(PROMPT, frames=5)) == 5
    with pytest.raises(ValueError, match=r"3 clips of 9 frames of 64 × 64 with guidance needs [0-9]+MB as the model was loaded; give that"):
        pipe.generate_batch([PROMPT] * 3, [0, 1, 2])


def test_a_lora_does_not_go_into_layers_that_are_packed_or_elsewhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in (Way("int8"), Way("float32", "host")):
        pipe = loaded(tiny_model, way, monkeypatch, "cpu")
        with pytest.raises(ValueError, match="the layers are in .*; add the LoRA before: reelflow models merge MODEL LORA -o FOLDER"):
            pipe.load_lora("any.safetensors")


def test_a_budget_is_for_one_process(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ranks", lambda config, device: Ranks(branches=2))
    with pytest.raises(ValueError, match="a memory budget is for one process; under torchrun use float32 or bfloat16"):
        reelflow.load(tiny_model, "cpu", memory_budget="4GB")


# Caches and parts


def passes(cache: KVCache) -> list[torch.Tensor]:
    """What three layers see in passes over a window that slides, at another place in each row, and goes back once."""
    generator, found = torch.Generator().manual_seed(0), []
    for slot in ([[0, 1, 2], [0, 1, 2]], [[3, 4, 5], [2, 3, 4]], [[4, 5, 6], [5, 6, 7]], [[3, 4, 5], [6, 7, 8]]):
        slot_Bn = torch.tensor(slot)
        used = int(slot_Bn.max()) + 1
        attends = cache.at(slot_Bn, torch.arange(used) <= slot_Bn[..., None])
        found += [attend(*torch.randn(3, 2, 2, 3, 8, generator=generator)) for attend in attends]
    return found


def new(kind: type[KVCache]) -> KVCache:
    return kind(3, 2, 2, 12, 8, torch.float32, torch.device("cpu"))


def test_a_cache_elsewhere_is_the_same_cache() -> None:
    for here, there in zip(passes(new(KVCache)), passes(new(HostCache)), strict=True):
        assert torch.equal(here, there)


def test_a_cache_in_bytes_is_off_by_half_a_step() -> None:
    k, v = torch.randn(2, 2, 2, 12, 8) * torch.logspace(-6, 6, 12)[:, None]
    seen = new(ByteCache).write(1, torch.arange(24), (k, v), 12)
    for found, true in zip(seen, (k, v), strict=True):
        step = true.abs().amax(-1, keepdim=True) / 127
        assert bool(((found - true).abs() <= step * 0.501).all())
        floats = true.to(torch.float8_e4m3fn).float()
        middle = slice(5, 7)  # about one, where 8-bit floating point has its range
        assert (found - true)[:, :, middle].square().mean() < (floats - true)[:, :, middle].square().mean() / 4
    assert torch.equal(new(ByteCache).write(0, torch.arange(24), (torch.zeros(2, 2, 12, 8),) * 2, 12)[0], torch.zeros(2, 2, 12, 8))


def test_a_clip_from_a_cache_in_bytes_is_nearly_the_same(tiny_model: Path, pipe: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    small = loaded(tiny_model, Way("float32", cache="bytes"), monkeypatch, "cpu")
    one, other = (found.generate(PROMPT, seed=3, frames=5).frames.astype(np.float32) for found in (pipe, small))
    assert 0 < np.sqrt(np.square(one - other).mean()) < 1


def test_layers_that_come_when_needed_are_the_same_layers(
    tiny_model: Path, pipe: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = loaded(tiny_model, Way("float32", "host"), monkeypatch, "cpu")
    assert np.array_equal(streamed.generate(PROMPT, seed=3, frames=5).frames, pipe.generate(PROMPT, seed=3, frames=5).frames)
    assert list(streamed.flow.state_dict()) == list(pipe.flow.state_dict())


def test_packed_parts_take_turns(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (loaded(tiny_model, Way("int8", turns=turns), monkeypatch, "cpu", frames=5) for turns in (False, True))
    assert np.array_equal(one.generate(PROMPT, seed=3, frames=5).frames, other.generate(PROMPT, seed=3, frames=5).frames)


def test_parts_go_home_also_after_an_error() -> None:
    with SecondDevice() as device:
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        homes = [id(p) for p in model.parameters()]
        parts = Parts(torch.device("mps"), {"all": (model, ()), "a": (model, ("b.",))})
        with pytest.raises(RuntimeError, match="half way"), parts.use("all", "unknown"):
            assert {str(p.device) for p in model.parameters()} == {"mps"}
            assert device.live == 4 * (16 + 4 + 4), "a shared weight is there once"
            raise RuntimeError("half way")
        assert device.live == 0
        assert [id(p) for p in model.parameters()] == homes
        with parts.use("a"):
            assert (str(model["a"].bias.device), str(model["b"].bias.device)) == ("mps", "cpu")

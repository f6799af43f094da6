"""A deepened model: what it did before, with layers that can learn and places that are told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import deepen
import pytest
import torch

import reelflow
from reelflow.config import FlowConfig
from reelflow.flow import StarFlow
from reelflow.pipelines.starflow import StarFlowPipeline


def made(model: Path, target: Path, *options: str) -> StarFlowPipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["deepen.py", str(model), str(target), *options])
        deepen.main()
    pipe = reelflow.load(str(target), "cpu", precision="float32")
    assert isinstance(pipe, StarFlowPipeline)
    return pipe


def inputs(pipe: StarFlowPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    config, generator = pipe.flow.config, torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, config.channels, 2, 2, generator=generator)
    return x, torch.randn(1, config.text_tokens, config.text_dim, generator=generator)


@torch.no_grad()
def test_new_layers_change_nothing_before_they_learn(tiny_model: Path, tmp_path: Path) -> None:
    before, after = reelflow.load(str(tiny_model), "cpu", precision="float32"), made(tiny_model, tmp_path / "deeper", "--after", "0")
    assert isinstance(before, StarFlowPipeline)
    assert after.flow.config.layers[-1] == before.flow.config.layers[-1] + 1
    given = inputs(before)
    torch.testing.assert_close(after.flow(*given).z, before.flow(*given).z)
    assert after.flow.deep_block.layers[1].attention.qkv.weight.any()


@torch.no_grad()
def test_a_deeper_denoiser_says_what_the_one_it_comes_from_says(tiny_model: Path, tmp_path: Path) -> None:
    before, after = reelflow.load(str(tiny_model), "cpu", precision="float32"), made(tiny_model, tmp_path / "deeper", "--denoiser", "3")
    assert isinstance(before, StarFlowPipeline)
    old, new = before.flow.denoiser, after.flow.denoiser
    assert old is not None
    assert new is not None
    assert len(new.layers) == len(old.layers) + 3
    given = inputs(before)
    torch.testing.assert_close(after.flow.score(*given), before.flow.score(*given))
    assert new.layers[-1].attention.qkv.weight.any()


def test_what_has_no_denoiser_gets_no_layers_in_it(tiny_model: Path, tmp_path: Path) -> None:
    config = FlowConfig.read(tiny_model / "transformer" / "config.json")
    config.model_copy(update={"denoiser": None}).write(tmp_path / "config.json")
    with pytest.raises(ValueError, match="--denoiser 2: this model has no denoiser to deepen"):
        deepen.deeper(tmp_path, [], [], None, 2)


@torch.no_grad()
def test_places_are_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    pipe = made(tiny_model, tmp_path / "placed", "--places", "4")
    embedding = pipe.flow.deep_block.pos_embed
    assert embedding is not None
    assert torch.pdist(embedding).min() > 0.1
    assert pipe.flow.config.learned_places == 4
    assert not any(block.pos_embed.any() for block in pipe.flow.shallow_blocks)


@torch.no_grad()
def test_new_layers_look_back_at_the_place_that_is_predicted() -> None:
    frames, places, text, width = 6, 16, 5, 128
    shape = {"channels": 4, "width": 64, "deep_width": width, "layers": (1, 2), "window": frames, "position_span": 4}
    config = FlowConfig(**shape, text_tokens=text, text_dim=8, learned_places=places)
    weights = deepen.deepen(StarFlow(config).state_dict(), config, [0], [3])
    flow = StarFlow(config.model_copy(update={"layers": (1, 3)}))
    flow.load_state_dict(weights)
    table = flow.rotary(flow.places(frames, (4, 4), True, torch.device("cpu")), (4, 4), True)
    query, key, _ = flow.deep_block.layers[1].attention.project(torch.randn(1, text + frames * places, width), table)
    share = (query @ key.mT / query.shape[-1] ** 0.5).tril().softmax(-1)[0, :, text:, text:]
    for place in (3 * places + 5, 5 * places + 2):
        for own, further in zip(share, (1, 4), strict=True):  # the next token there, whose input is one late, and the one below
            assert int(own[place].argmax()) == place - 3 * places + further
            assert own[place].max() > 0.8


def test_all_that_looks_back_can_learn() -> None:
    """Where a pair of channels is zero in queries and keys, the score has no slope in either."""
    config = FlowConfig(channels=4, width=64, deep_width=128, layers=(1, 1), window=6, position_span=4, learned_places=16)
    layer = deepen.deepen(StarFlow(config).state_dict(), config, [0], [3])
    weight, bias = (layer[f"deep_block.layers.1.attention.qkv.{name}"][:256] for name in ("weight", "bias"))
    queries, keys = torch.cat((weight, bias[:, None]), 1).unflatten(0, (2, 64, 2)).abs().sum((-1, -2))
    assert bool(((queries > 0) | (keys > 0)).all())
    assert bool(((queries == 0) & (keys > 0)).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--after", "7"), "--after 7: the deep block has layers 0 … "),
        (("--places", "6"), "--places 6 is not a square frame"),
        (("--places", "16", "--back", "3"), "--back is where new layers look; --after says"),
        (("--after", "0", "--back", "3"), "and known places (--places)"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        made(tiny_model, tmp_path / "none", *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

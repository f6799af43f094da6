"""A grown network is the small one's function, and no more equal units than that needs."""

from __future__ import annotations

from pathlib import Path

import grown
import pytest
import torch

import reelflow
from reelflow.config import DenoiserConfig
from reelflow.flow import StarFlow
from reelflow.pipelines.starflow import StarFlowPipeline


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> StarFlow:
    return grown.flow_of(tiny_model)


def sizes(small: StarFlow) -> dict[str, object]:
    """Wider by different factors, deeper in every block."""
    denoiser = DenoiserConfig(**(small.config.denoiser.model_dump() | {"layers": 3, "width": 64}))
    return {"width": 64, "deep_width": 192, "layers": (2, 1, 4), "denoiser": denoiser}


@torch.no_grad()
def test_one_function(small: StarFlow) -> None:
    large = grown.grow(small, small.config.model_copy(update=sizes(small)))
    x, text = torch.randn(1, 3, 8, 4, 4), torch.randn(1, 48, 16)
    own, same = small(x, text), large(x, text)
    assert own.log_det.abs().max() > 0.01, "not the identity"
    torch.testing.assert_close(same.z, own.z, rtol=0, atol=1e-4)
    torch.testing.assert_close(same.log_det, own.log_det, rtol=0, atol=1e-4)
    assert sum(p.numel() for p in large.parameters()) > 4 * sum(p.numel() for p in small.parameters())


@torch.no_grad()
def test_with_an_embedding_of_places(small: StarFlow) -> None:
    placed = StarFlow(small.config.model_copy(update={"learned_places": 16}))
    placed.load_state_dict(small.state_dict(), strict=False)
    for block in placed.blocks:
        torch.nn.init.normal_(block.pos_embed)
    large = grown.grow(placed, placed.config.model_copy(update=sizes(small)))
    x, text = torch.randn(1, 3, 8, 4, 4), torch.randn(1, 48, 16)
    own = placed(x, text).z
    assert (own - small(x, text).z).abs().max() > 0.01, "the embedding matters"
    torch.testing.assert_close(large(x, text).z, own, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_denoiser_too(small: StarFlow) -> None:
    look = DenoiserConfig(**(small.config.denoiser.model_dump() | {"width": 96}))
    large = grown.grow(small, small.config.model_copy(update={"denoiser": look}))
    x, text = torch.randn(1, 3, 8, 4, 4), torch.randn(1, 48, 16)
    assert small.score(x, text).abs().max() > 0.01
    torch.testing.assert_close(large.score(x, text), small.score(x, text), rtol=0, atol=1e-4)


@torch.no_grad()
def test_units_differ_and_new_layers_write_nothing(small: StarFlow) -> None:
    large = grown.grow(small, small.config.model_copy(update=sizes(small)), torch.bfloat16)
    layers = large.deep_block.layers
    up = layers[0].mlp.up
    assert up.weight.dtype == torch.bfloat16
    assert large.deep_block.proj_in.weight.dtype == torch.float32
    left, right = up.weight.float().chunk(3, 1)[:2]
    assert not torch.equal(left, right)
    new = layers[3]
    assert new.mlp.down.weight.abs().max() > 0
    assert new.mlp.down.weight.float().unflatten(1, (3, -1)).sum(1).abs().max() == 0
    hidden = torch.randn(1, 5, 64).repeat(1, 1, 3)
    torch.testing.assert_close(new(hidden, None, lambda q, k, v: v), hidden, rtol=0, atol=2e-2)


def test_sizes_that_are_no_multiples(small: StarFlow) -> None:
    with pytest.raises(ValueError, match=r"proj_in.weight: \(48, 8\) is no multiple of \(32, 8\)"):
        grown.grow(small, small.config.model_copy(update={"width": 48}))


def test_text_keeps_its_positions() -> None:
    states = torch.arange(1.0, 5)[None, :, None].expand(1, 4, 2)
    found = grown.spread(states, 10, 4)
    assert found.shape == (1, 10, 4)
    assert found[0, :, 3].tolist() == [1, 0, 2, 0, 0, 3, 0, 4, 0, 0]


def test_a_folder_for_every_command(tiny_model: Path, tmp_path: Path) -> None:
    count = grown.write(tmp_path / "wide", str(tiny_model), 2)
    pipe = reelflow.load(tmp_path / "wide", "cpu")
    assert isinstance(pipe, StarFlowPipeline)
    assert pipe.about.name == "wide"
    assert (pipe.flow.config.deep_width, count) == (128, sum(p.numel() for p in pipe.flow.parameters()))
    assert len(pipe.generate("a red ball", seed=0, frames=5)) == 5

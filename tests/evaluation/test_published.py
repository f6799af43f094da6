"""The published sampler is what its description says: which chunks, from what, until when."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelflow.evaluation.published import Published
from reelflow.flow import Affine, StarFlow
from reelflow.sampling import Schedule, sample

tiny = runpy.run_path(str(Path(__file__).parents[1] / "pipelines" / "tiny.py"))


@pytest.fixture
def flow() -> StarFlow:
    torch.manual_seed(0)
    return tiny["tiny_flow"]().eval()


def inputs(flow: StarFlow, clips: int, frames: int = 3, size: tuple[int, int] = (4, 4)) -> tuple[Tensor, Tensor]:
    """Noise, and text states with the unconditional ones behind."""
    config = flow.config
    return torch.randn(clips, frames, config.channels, *size), torch.randn(2 * clips, config.text_tokens, config.text_dim)


def test_chunks_and_where_they_start(flow: StarFlow) -> None:
    block, z, calls = flow.deep_block, torch.randn(1, 576, flow.config.channels), []

    def read(inputs: Tensor, place: Tensor, used: int) -> Affine:
        calls.append((int(place[0, 0]), used, inputs.clone()))
        return Affine(torch.zeros_like(inputs), torch.full_like(inputs, 2.0))

    found, report = Published().invert(block, read, z, 64)
    assert torch.equal(found, 2 * z)
    chunks = [(0, 32), (32, 64), (64, 96), (96, 224), (224, 352), (352, 480), (480, 576)]
    assert [(start, stop) for start, stop, _ in calls] == [chunk for chunk in chunks for _ in range(2)]
    assert (report.passes, report.evaluations) == (14, 2 * 576)
    stream = torch.cat((block.sos.expand(1, 1, -1), z), 1)
    for start, stop, given in calls[::2]:
        known = torch.cat((stream[:, :1], 2 * stream[:, 1 : start + 1], stream[:, start + 1 :]), 1)
        back = 64 if start > 64 else 0
        torch.testing.assert_close(given, known[:, start - back : stop - back], rtol=0, atol=0)


def test_one_criterion_for_the_whole_batch(flow: StarFlow) -> None:
    z = torch.cat((100 * torch.ones(1, 16, 8), torch.ones(1, 16, 8)))

    def passes(z: Tensor) -> int:
        count = 0

        def read(inputs: Tensor, place: Tensor, used: int) -> Affine:
            nonlocal count
            count += 1
            return Affine(torch.zeros_like(inputs) + 0.5**count, torch.ones_like(inputs))

        return Published().invert(flow.deep_block, read, z, 16)[1].passes

    assert (passes(z[:1]), passes(z[1:]), passes(z)) == (1, 5, 1)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_both_engines_are_one_algorithm(flow: StarFlow, guidance: float) -> None:
    noise, text = inputs(flow, clips=2)
    text = text if guidance else text[:2]
    own, reports = Published().sample(flow, noise, text, guidance)
    ours, same = Published(own_engine=False).sample(flow, noise, text, guidance)
    assert reports == same
    torch.testing.assert_close(own, ours, rtol=0, atol=1e-5)


def test_it_comes_to_the_sequential_answer_if_it_is_let(flow: StarFlow) -> None:
    noise, text = inputs(flow, clips=1)
    wanted, _ = sample(flow, noise, text, 1.5, schedule=Schedule("sequential"))
    exact, rough = (Published(tolerance).sample(flow, noise, text, 1.5)[0] for tolerance in (1e-12, 1e-3))
    torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-4)
    assert (rough - wanted).abs().max() > 1e-3


def test_it_runs_in_float32(flow: StarFlow) -> None:
    noise, text = inputs(flow, clips=1)
    with pytest.raises(ValueError, match="published sampler runs in float32, this model in .*bfloat16"):
        Published().sample(flow.set_precision(torch.bfloat16), noise, text, 1.5)

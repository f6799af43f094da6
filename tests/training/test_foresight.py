"""What a flow expects of a frame: the likelihood beside it is its own, nothing of the frame is in it, and training comes nearer to it.

Shapes: B batch, F latent frames, S places of a frame, C channels.
"""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelflow.config import FlowConfig
from reelflow.flow import order
from reelflow.training.config import TrainConfig
from reelflow.training.foresight import ForeseeingFlow
from reelflow.training.loss import nll

tiny: dict[str, Any] = runpy.run_path(str(Path(__file__).parent / "tiny.py"))
FRAMES, SIZE = 4, (2, 3)


@pytest.fixture(params=["text", "no text", "one block"])
def flow(request: pytest.FixtureRequest) -> ForeseeingFlow:
    """In float64; `one block` is deep and reads its frames backwards."""
    changes: dict[str, Any] = {"text": {}, "no text": {"text_tokens": 0, "text_dim": 0}, "one block": {"layers": [2]}}
    model = ForeseeingFlow(FlowConfig(**tiny["SETTINGS"]["flow"] | changes[request.param]))
    tiny["fill"](model, 1)
    return model.double().eval().requires_grad_(False)


def given(flow: ForeseeingFlow) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, FRAMES, 3, *SIZE, generator=generator).double()
    return x, torch.randn(2, 6, 8, generator=generator).double() if flow.config.text_tokens else None


def test_the_likelihood_beside_it_is_the_flows_own(flow: ForeseeingFlow) -> None:
    x, text = given(flow)
    torch.testing.assert_close(flow.foreseen(x, x + 1, text)[0], nll(flow, x, text))


def test_frames_that_do_not_count_add_nothing(flow: ForeseeingFlow) -> None:
    x, text = given(flow)
    learned = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]).double()
    z, log_det = flow(x, text)
    by_frame = (0.5 * z.square() - log_det).flatten(2).mean(2)
    wanted = torch.stack((by_frame[0, 1:].mean(), by_frame[1, 2:].mean()))
    likelihood, error = flow.foreseen(x, x + 0.3, text, learned)
    torch.testing.assert_close(nll(flow, x, text, learned), wanted)
    torch.testing.assert_close(likelihood, wanted)
    assert error[0] == flow.foreseen(x, x + 0.3, text)[1][0]
    assert error[1] != flow.foreseen(x, x + 0.3, text)[1][1]


def test_the_error_is_to_tokens_without_noise_in_the_scales_of_the_likelihood(flow: ForeseeingFlow) -> None:
    x, text = given(flow)
    clean = x + 0.3
    noisy, wanted = (order(flow.to_deep(latents)[0], flow.deep_block) for latents in (x, clean))
    known, expected = flow.both_parameters(noisy, SIZE, text)
    squares = torch.zeros(2).double()
    for frame, place in itertools.product(range(1, FRAMES), range(6)):
        at = frame * 6 + place
        squares += ((wanted[:, frame, place] - expected[:, at - 6]) / known.scale[:, at]).square().sum(-1)
    torch.testing.assert_close(flow.foreseen(x, clean, text)[1], squares / 2 / (3 * 6 * 3))


def test_a_frame_sees_all_frames_before_it_and_nothing_of_itself(flow: ForeseeingFlow) -> None:
    """Changing one token of a frame changes the parameters of all later frames' places, of no others."""
    places = SIZE[0] * SIZE[1]
    u, (_, text) = torch.randn(2, FRAMES, places, 3).double(), given(flow)
    _, before = flow.both_parameters(u, SIZE, text)
    for frame in range(FRAMES):
        for place in range(places):
            changed = u.clone()
            changed[:, frame, place] += 0.1
            _, after = flow.both_parameters(changed, SIZE, text)
            moved = (after != before).any(-1).unflatten(1, (FRAMES - 1, places))
            assert moved[:, frame:].all()
            assert not moved[:, :frame].any()


def test_a_first_place_is_as_in_the_likelihood(flow: ForeseeingFlow) -> None:
    """It has nothing of its own frame before it: without its neighbours, whose inputs are hidden, both give the same."""
    x, text = given(flow)
    for first in flow.deep_block.layers:
        nn.init.zeros_(first.attention.proj.weight)  # every token for itself
    u = x[..., :1, :1].flatten(3).transpose(2, 3).expand(-1, -1, 6, -1)
    known, told = flow.both_parameters(u, SIZE, text)
    torch.testing.assert_close(told[:, ::6], known.shift[:, 6::6])
    assert not torch.allclose(told[:, 1::6], known.shift[:, 7::6])


def test_training_lowers_it(tmp_path: Path) -> None:
    """Frames that repeat the first one: told by those before, and by a pixel of their own."""
    buckets = [{"task": "generate", "frames": 3, "batch": 8}]
    stages = [{"steps": 300, "denoiser": False, "foresight": 1.0, "buckets": buckets}]
    config = TrainConfig.parse(tiny["SETTINGS"] | {"stages": stages, "lr": 1e-2})
    objective = tiny["FlowObjective"](config, tiny["Text"]())
    batch = lambda step: tiny["Batch"](still(step), ["a red ball stays still"] * 8)  # noqa: E731
    trainer = tiny["Trainer"](config, batch, objective, tmp_path)
    losses = [trainer.train_step()["foresight_loss"] for _ in range(300)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def still(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 3, 2, 2, generator=generator).expand(-1, 3, -1, -1, -1).contiguous()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "denoiser: false"), ({"flow": tiny["SETTINGS"]["flow"] | {"sos": False, "denoiser": None}}, "flow.sos = false")],
)
def test_what_does_not_go_with_it(changes: dict[str, Any], words: str) -> None:
    stages = [tiny["STAGE"] | {"foresight": 0.5}]
    with pytest.raises(ValueError, match=words):
        TrainConfig.parse(tiny["SETTINGS"] | {"stages": stages} | changes)

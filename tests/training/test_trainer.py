"""The trainer: it learns, the denoiser's loss stays its own, runs resume bit by bit, nothing is lost or hidden.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelflow.adapters.text import TextEncoder
from reelflow.likelihood import log_prob
from reelflow.training.batches import Batch
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.flow import FlowObjective
from reelflow.training.loss import nll, score_loss, score_target
from reelflow.training.optimizers import rate
from reelflow.training.text import new_text_encoder
from reelflow.training.trainer import Trainer

CAPTIONS = ["a red ball moves right", "a blue box stays still", "a green star circles", ""]
SETTINGS: dict[str, Any] = {
    "about": {"family": "starflow-v", "name": "tiny", "size": 64, "frames": 5},
    "flow": {
        "channels": 3, "width": 24, "deep_width": 48, "layers": [1, 1, 2], "head_dim": 24, "window": 2, "text_tokens": 6, "text_dim": 8,
        "position_span": 4, "noise_std": 0.5, "denoiser": {"layers": 1, "width": 24},
    },
    "latents": "latents", "vae": "vae", "text": {"width": 8, "layers": 1, "heads": 2, "vocabulary": 300},
    "stages": [{"steps": 6, "buckets": [{"task": "generate", "frames": 2, "batch": 4}]}],
    "lr": 3e-3, "denoiser_lr": 1e-3, "warmup": 2, "grad_skip": False, "precision": "float32", "save_every": 3, "log_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return new_text_encoder(TextConfig(**SETTINGS["text"]), SETTINGS["flow"]["text_tokens"], CAPTIONS)


def fill(module: nn.Module, seed: int) -> None:
    """Weights that do not depend on how a library initialises its layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            spread = 0.1 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5
            parameter.mul_("norm" in name).add_(spread * torch.randn(parameter.shape, generator=generator))


def latents(step: int) -> Tensor:
    return 0.3 * torch.randn(4, 2, 3, 2, 2, generator=torch.Generator().manual_seed(step)) + 1.0


def make_trainer(folder: Path, text: TextEncoder, values: dict[str, Any] | None = None, fixed: bool = False) -> Trainer:
    """A run on Gaussian latents, always begun from the same weights (those of `text` are copied)."""
    text = TextEncoder(copy.deepcopy(text.model), text.tokenizer, text.tokens)
    fill(text.model, 2)
    config = TrainConfig.parse(SETTINGS | (values or {}))
    trainer = Trainer(config, lambda step: Batch(latents(0 if fixed else step), CAPTIONS), FlowObjective(config, text), folder)
    if not trainer.step:
        fill(trainer.objective.flow, 1)
    return trainer


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists, by its path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def require_equal(found: Any, wanted: Any) -> None:
    first, second = flat(found), flat(wanted)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert torch.equal(leaf, second[path]) if isinstance(leaf, Tensor) else leaf == second[path], path


def state_of(trainer: Trainer) -> dict[str, Any]:
    found = {"weights": trainer.weights, "average": trainer.average, "optimizers": trainer.optimizers.state(), "step": trainer.step}
    return {path: leaf.clone() if isinstance(leaf, Tensor) else leaf for path, leaf in flat(found).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_changes_every_weight(tmp_path: Path, text: TextEncoder, optimizer: str) -> None:
    trainer = make_trainer(tmp_path, text, {"optimizer": optimizer})
    before = state_of(trainer)
    row = trainer.train_step()
    unchanged = [path for path, leaf in state_of(trainer).items() if path.startswith("/weights") and torch.equal(leaf, before[path])]
    assert unchanged == []
    assert trainer.step == 1
    assert row.keys() == {"loss", "score_loss", "grad_norm"}


def test_twenty_steps_lower_both_losses(tmp_path: Path, text: TextEncoder) -> None:
    trainer = make_trainer(tmp_path, text, {"stages": [{"steps": 20, "buckets": SETTINGS["stages"][0]["buckets"]}]}, fixed=True)
    rows = [trainer.train_step() for _ in range(20)]
    for key in ("loss", "score_loss"):
        first, last = (sum(row[key] for row in part) / 4 for part in (rows[:4], rows[-4:]))
        assert last < first - 0.05


def test_the_denoisers_loss_reaches_the_denoiser_only(tmp_path: Path, text: TextEncoder) -> None:
    trainer = make_trainer(tmp_path, text)
    x = latents(0).requires_grad_()
    score_loss(trainer.objective.flow, x, torch.zeros_like(x), trainer.objective.text.states(CAPTIONS)).backward()
    reached = {name for name, parameter in trainer.weights.items() if parameter.grad is not None}
    assert reached == {name for name in trainer.weights if name.startswith("flow.denoiser.")}
    assert x.grad is None


def test_the_flow_learns_the_same_with_and_without_a_denoiser(tmp_path: Path, text: TextEncoder) -> None:
    """Also the clipping of the flow's gradient does not depend on the denoiser's."""
    with_denoiser = make_trainer(tmp_path / "with", text)
    weights = {key: value.clone() for key, value in with_denoiser.objective.flow.state_dict().items() if not key.startswith("denoiser.")}
    wanted = [with_denoiser.train_step()["loss"] for _ in range(3)]
    without = make_trainer(tmp_path / "without", text, {"flow": SETTINGS["flow"] | {"denoiser": None}})
    without.objective.flow.load_state_dict(weights)
    assert [without.train_step()["loss"] for _ in range(3)] == wanted


def test_score_target_is_the_slope_of_log_p(tmp_path: Path, text: TextEncoder) -> None:
    flow, states = make_trainer(tmp_path, text).objective.flow.double(), torch.randn(4, 6, 8).double()
    x = latents(0).double().requires_grad_()
    noise_std, weight = torch.tensor([0.5, 0.4, 0.3, 0.2]).double(), torch.tensor([1.0, 0.25, 3.0, 0.5]).double()
    (slope,) = torch.autograd.grad((weight * nll(flow, x, states)).sum(), x)
    (wanted,) = torch.autograd.grad(-log_prob(flow, x, states).total.sum(), x)
    torch.testing.assert_close(score_target(slope, noise_std, weight), noise_std.square()[:, None, None, None, None] / 0.3 * wanted)


def test_loss_is_minus_log_p_per_value(tmp_path: Path, text: TextEncoder) -> None:
    flow, x, states = make_trainer(tmp_path, text).objective.flow, latents(0), torch.randn(4, 6, 8)
    wanted = -log_prob(flow, x, states).total / x[0].numel() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(nll(flow, x, states), wanted)


def test_resuming_is_bit_identical(tmp_path: Path, text: TextEncoder) -> None:
    whole = make_trainer(tmp_path / "whole", text)
    whole.run()
    wanted = state_of(whole)
    stopped = make_trainer(tmp_path / "stopped", text)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    stopped.checkpoints.close()
    resumed = make_trainer(tmp_path / "stopped", text)
    assert resumed.step == 3
    resumed.run()
    require_equal(state_of(resumed), wanted)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["seconds_left"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path, text: TextEncoder, value: float) -> None:
    trainer = make_trainer(tmp_path, text)
    trainer.train_step()
    before = state_of(trainer)
    trainer.feed.source = lambda step: Batch(latents(step).index_fill(0, torch.tensor([1]), value), CAPTIONS)
    with pytest.raises(ValueError, match=r"step 1: loss (nan|inf).*not finite; lower lr"):
        trainer.train_step()
    require_equal(state_of(trainer), before)


def test_large_gradients_are_clipped_and_after_a_hundred_steps_skipped(tmp_path: Path, text: TextEncoder) -> None:
    trainer = make_trainer(tmp_path, text, {"grad_skip": True, "grad_clip": 1e-3})
    for step, changes in ((99, True), (100, False)):
        trainer.step = step
        before = state_of(trainer)
        assert trainer.train_step()["grad_norm"] > 1e-3
        after = state_of(trainer)
        assert changes == any(not torch.equal(after[path], before[path]) for path in before if path.startswith("/weights"))
    assert (trainer.skipped, trainer.step) == (1, 101)


def test_the_rate_warms_up_and_falls_along_a_cosine(tmp_path: Path, text: TextEncoder) -> None:
    stages = [{"steps": 60, "buckets": SETTINGS["stages"][0]["buckets"]}, {"steps": 50, "buckets": SETTINGS["stages"][0]["buckets"]}]
    trainer = make_trainer(tmp_path, text, {"stages": stages, "warmup": 10, "min_lr": 1e-4})
    rates = [rate(trainer.config, 1e-3, step, trainer.config.steps) for step in range(111)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1e-4 + 4.5e-4 * (1 + math.cos(math.pi * step / 100)) for step in range(101)])
    trainer.train_step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers.all] == pytest.approx([3e-4, 1e-4])


def test_the_denoiser_has_a_schedule_of_its_own(tmp_path: Path, text: TextEncoder) -> None:
    """Over the steps in which it learns: where it comes last, its rate is not what the flow's cosine has left."""
    buckets, plan = SETTINGS["stages"][0]["buckets"], ((30, False), (20, True), (40, False), (10, True))
    stages = [{"steps": steps, "buckets": buckets, "denoiser": learns} for steps, learns in plan]
    trainer = make_trainer(tmp_path, text, {"stages": stages, "warmup": 5, "denoiser_lr": 1e-3})
    config = trainer.config
    assert [config.denoising(step) for step in (0, 30, 31, 50, 90, 91, 100, 200)] == [0, 0, 1, 20, 20, 21, 30, 30]
    found = [trainer.optimizers.rates(step)[-1] for step in (30, 34, 35, 49, 91, 99)]
    assert found == [rate(config, 1e-3, step, 30) for step in (0, 4, 5, 19, 21, 29)]
    assert max(found) == found[1] == 1e-3
    assert trainer.optimizers.rates(99)[0] == rate(config, config.lr, 99, 100)


def test_the_average_follows_the_weights(tmp_path: Path, text: TextEncoder) -> None:
    trainer = make_trainer(tmp_path, text, {"ema": 0.9})
    name = "flow.deep_block.proj_in.weight"
    wanted = None
    for _ in range(4):
        trainer.train_step()
        weight = trainer.weights[name].detach().clone()
        wanted = weight if wanted is None else 0.9 * wanted + 0.1 * weight
    torch.testing.assert_close(trainer.average[name], wanted)


def test_a_frozen_text_encoder_stays(tmp_path: Path, text: TextEncoder) -> None:
    trainer = make_trainer(tmp_path, text, {"text": "encoder"})
    before = copy.deepcopy(trainer.objective.text.model.state_dict())
    trainer.train_step()
    require_equal(trainer.objective.text.model.state_dict(), before)
    assert not any(name.startswith("text") for name in trainer.weights)


def test_a_checkpoint_of_another_architecture(tmp_path: Path, text: TextEncoder) -> None:
    first = make_trainer(tmp_path, text)
    first.save()
    first.checkpoints.close()
    for change in ({"layers": [1, 2]}, {"denoiser": None}, {"channels": 2}):
        with pytest.raises(ValueError, match=r"step-00000000: of another architecture \(.*\); give another folder") as error:
            make_trainer(tmp_path, text, {"flow": SETTINGS["flow"] | change})
        assert "\n" not in str(error.value)


def test_golden_losses_of_ten_steps(golden: Path, tmp_path: Path, text: TextEncoder) -> None:
    """A change here is a change of what is computed: it needs a reason in the commit.

    The text encoder's tokenizer and layers are a library's, so their states are replaced by fixed ones.
    """
    trainer = make_trainer(tmp_path, text, {"stages": [{"steps": 10, "buckets": SETTINGS["stages"][0]["buckets"]}]})
    states = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(5))
    trainer.objective.text.states = lambda prompts: states
    rows = [trainer.train_step() for _ in range(10)]
    wanted = json.loads((golden / "training.json").read_text(encoding="utf-8"))
    for key, values in wanted.items():
        assert [row[key] for row in rows] == pytest.approx(values, rel=1e-5), key

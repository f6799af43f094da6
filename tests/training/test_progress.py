"""What a run says of itself: counted arithmetic, rows that do not depend on interruptions, TensorBoard."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelflow.config import FlowConfig
from reelflow.training import flops
from reelflow.training.config import TrainConfig
from reelflow.training.flow import FlowObjective
from reelflow.training.foresight import ForeseeingFlow
from reelflow.training.progress import Log, Meter

tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
BASE = {
    "channels": 3, "width": 32, "deep_width": 64, "layers": [1, 2, 3], "head_dim": 16, "window": 5, "text_tokens": 6, "text_dim": 8,
    "position_span": 4, "denoiser": {"layers": 3, "width": 48, "window": 2},
}  # fmt: skip


def attention(query: Any, key: Any, value: Any, drop: float = 0.0, causal: bool = False, *rest: Any, **more: Any) -> int:
    """Of scaled dot products on the CPU, which torch's counter leaves out; causal ones by half."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width // (2 if causal else 1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mlp": "swiglu", "num_kv_heads": 1, "bias": False, "norm": "rms"},
        {"text_tokens": 0, "text_dim": 0},
        {"denoiser": {"layers": 2, "width": 32, "window": 3, "look_ahead_layers": "first", "text": False}},
        {"denoiser": {"layers": 1, "width": 32, "window": None}},
        {"denoiser": None},
    ],
)
def test_the_arithmetic_is_what_torch_counts(change: dict[str, Any]) -> None:
    config = FlowConfig(**(BASE | change))
    flow, x = ForeseeingFlow(config), torch.randn(1, 4, 3, 3, 5)
    text = torch.randn(1, 6, 8) if config.text_tokens else None
    foreseen = lambda x, text: flow.both_parameters(flow.to_deep(x)[0], (3, 5), text)  # noqa: E731
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    alone, foresight = flops.flow_forward(config, 4, 15), flops.foresight_forward(config, 4, 15)
    for forward, expected in ((flow, alone), (foreseen, alone + foresight), (flow.score, flops.denoiser_forward(config, 4, 15))):
        if forward == flow.score and config.denoiser is None:
            assert expected == 0
            continue
        with FlopCounterMode(display=False, custom_mapping=kernels) as counter, torch.no_grad():
            forward(x, text)
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    both = alone + flops.denoiser_forward(config, 4, 15)
    assert flops.training_step(config, 4, 15) == 3 * both
    assert flops.training_step(config, 4, 15, denoiser=False, adapters=True) == 2 * alone
    assert flops.training_step(config, 4, 15, denoiser=False, foresight=True) == 3 * (alone + foresight)


def test_published_arithmetic_is_six_times_parameters_and_tokens() -> None:
    """STARFlow-V at 480p: about 6 · 7 · 10⁹ per token by its matrices, and attention over 33 390 tokens on top."""
    config = FlowConfig(
        channels=48, width=3072, deep_width=4096, layers=(2, 2, 2, 2, 2, 24), window=21, text_tokens=256, text_dim=2048, position_span=32,
        denoiser={"layers": 8, "width": 3072},
    )  # fmt: skip
    tokens = 21 * 30 * 53
    matrices = 6 * 6.89e9 * tokens
    attended = 3 * 24 * 4 * (tokens + 256) ** 2 / 2 * 4096
    assert flops.training_step(config, 21, 30 * 53) == pytest.approx(matrices + attended, rel=0.2)
    assert flops.training_step(config, 21, 30 * 53) > matrices + attended


def test_a_peak_is_measured_where_it_is_not_known() -> None:
    assert 1e8 < flops.peak(torch.device("cpu"), "float32") < 1e15


def config(**values: Any) -> TrainConfig:
    return TrainConfig.parse(tiny["SETTINGS"] | values)


def test_a_row_is_the_mean_of_its_steps_also_of_those_before_an_interruption() -> None:
    found = Meter(config(), torch.device("cpu"), 1)
    for loss in (1.0, 2.0):
        found.add({"loss": loss, "score_loss": 10 * loss, "grad_norm": 4.0}, 32, 5e9)
    resumed = Meter(config(), torch.device("cpu"), 1)
    resumed.restore(found.state())
    resumed.add({"loss": 6.0, "score_loss": 0.0, "grad_norm": 1.0}, 32, 5e9)
    row = resumed.row(3, 1, 0.0, FlowObjective.explain)
    assert (row["loss"], row["score_loss"], row["grad_norm"], row["skipped"], row["data_wait"]) == (3.0, 10.0, 3.0, 1, 0.0)
    assert row["bits_per_dim"] == pytest.approx((3.0 + 0.91894) / 0.693147, abs=1e-4)
    assert (resumed.tokens, resumed.work) == (32, 5e9)  # the speed is that of this process
    assert row.keys() >= {"tokens_per_second", "mfu", "seconds_left"}
    assert resumed.state().shape == (0, 3)


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    log = Log(tmp_path, config(), 4)
    log.write({"step": 6, "loss": 1.0})
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 2}, {"step": 4}, {"step": 6, "loss": 1.0},
    ]  # fmt: skip


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny["make"](tmp_path, {"tensorboard": True})
    trainer.run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    written = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert written == [(row["step"], row["loss"]) for row in rows]

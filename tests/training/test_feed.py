"""What a rank is fed: its rows and no others, noise that depends on nothing but seed, step and row, and levels the model is told."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from reelflow.adapters.text import wrap_prompt
from reelflow.training.batches import Batch
from reelflow.training.config import TrainConfig
from reelflow.training.feed import FlowFeed, Rows
from reelflow.training.loss import noise_weight

tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
ANTITHETIC = [{"steps": 4, "antithetic": True, "buckets": [{"task": "generate", "frames": 2, "batch": 5}]}]


def feed(rank: int = 0, ranks: int = 1, batch: int = 5, source: Any = None, **values: Any) -> FlowFeed:
    stages = [{"steps": 4, "buckets": [{"task": "generate", "frames": 2, "batch": batch}]}]
    return FlowFeed(TrainConfig.parse(tiny["SETTINGS"] | {"stages": stages} | values), source or batch_of(batch), rank, ranks)


def batch_of(rows: int) -> Any:
    return lambda step: Batch(tiny["latents"](step, rows), [f"{step}.{row}" for row in range(rows)])


def whole(parts: list[list[Rows]]) -> dict[str, torch.Tensor]:
    return {prompt: x for some in parts for rows in some for prompt, x in zip(rows.prompts, rows.x, strict=True)}


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (2, 2), (5, 1)])
def test_however_rows_are_split_they_are_the_same(ranks: int, accumulate: int) -> None:
    (wanted,) = feed()(3)
    found = [feed(rank, ranks, accumulate=accumulate)(3) for rank in range(ranks)]
    assert all(len(parts) == accumulate for parts in found)
    assert sum(rows.share for parts in found for rows in parts) == pytest.approx(1.0)
    rows = whole(found)
    assert set(rows) == set(wanted.prompts)
    assert all(torch.equal(rows[prompt], x) for prompt, x in zip(wanted.prompts, wanted.x, strict=True))


def test_noise_has_the_models_deviation_and_is_new_for_every_row_and_step() -> None:
    (first,), (second,) = feed(batch=64)(0), feed(batch=64)(1)
    noise = [rows.x - tiny["latents"](step, 64) for step, rows in enumerate((first, second))]
    for values in noise:
        assert values.mean().abs() < 0.05
        assert values.std() == pytest.approx(0.5, rel=0.05)
    together = torch.stack([*noise[0].flatten(1), *noise[1].flatten(1)])
    assert (torch.corrcoef(together) - torch.eye(128)).abs().max() < 0.8
    assert not torch.equal(feed(seed=1)(0)[0].x, feed()(0)[0].x)
    assert set(first.noise_std_B.tolist()) == {0.5}


def test_antithetic_rows_are_the_same_clips_with_the_opposite_noise() -> None:
    (alone,), (rows,) = feed()(2), feed(stages=ANTITHETIC)(2)
    assert torch.equal(rows.x[:5], alone.x)
    assert torch.equal(rows.clean, alone.clean.repeat(2, 1, 1, 1, 1))
    torch.testing.assert_close(rows.x[5:] - alone.clean, alone.clean - alone.x)
    assert (rows.prompts, rows.noise_std_B.tolist(), rows.share) == (2 * alone.prompts, 2 * alone.noise_std_B.tolist(), 1.0)


def test_frames_that_count_belong_to_their_rows() -> None:
    def some(step: int) -> Batch:
        return Batch(tiny["latents"](step, 5), [str(row) for row in range(5)], torch.tensor([[1.0, 1], [0, 1], [0, 1], [1, 1], [0, 1]]))

    for rank in range(2):
        (rows,) = feed(rank, 2, source=some, stages=ANTITHETIC)(1)
        wanted = [[1.0, 1.0] if row in "03" else [0.0, 1.0] for row in rows.prompts]
        assert rows.learned_BF is not None
        assert rows.learned_BF.tolist() == wanted
    assert feed()(0)[0].learned_BF is None


def test_antithetic_rows_stay_together_however_they_are_split() -> None:
    (wanted,) = feed(stages=ANTITHETIC)(1)
    for rank in range(2):
        own = range(rank, 5, 2)
        (rows,) = feed(rank, 2, stages=ANTITHETIC)(1)
        assert torch.equal(rows.x, torch.cat((wanted.x[:5][own], wanted.x[5:][own])))
        assert rows.share == len(own) / 5


def test_only_the_rows_of_the_rank_are_read() -> None:
    read = []

    class Latents:
        def __getitem__(self, row: int) -> torch.Tensor:
            read.append(row)
            return torch.zeros(2, 3, 2, 2)

    feed(1, 2, source=lambda step: Batch(Latents(), ["x"] * 5))(0)
    assert read == [1, 3]


def test_levels_of_a_range_are_drawn_and_told() -> None:
    about = tiny["SETTINGS"]["about"] | {"prompt": {"fps": False, "noise": True}}
    written = wrap_prompt("a ball", fps=None, image=False, noise_std=0.5, aspect=None)
    nothing = Batch(torch.zeros(64, 2, 3, 2, 2), [written] * 64)
    found = feed(batch=64, about=about, noise_range=[0.2, 0.6], source=lambda step: nothing)(0)[0]
    levels = found.noise_std_B
    assert 0.2 <= float(levels.min()) < 0.25
    assert 0.55 < float(levels.max()) <= 0.6
    for level, prompt, x in zip(levels.tolist(), found.prompts, found.x, strict=True):
        assert prompt == f"Noise Level {int(1000 * level)}:\na ball"
        assert x.std() == pytest.approx(level, rel=0.7)
    assert torch.allclose(found.x.flatten(1).std(1).mean(), levels.mean(), rtol=0.1)


def test_a_told_level_weighs_the_loss() -> None:
    levels = torch.tensor([0.3, 0.6])
    assert noise_weight(levels, told=True).tolist() == pytest.approx([1.0, 2.0])
    assert noise_weight(levels, told=False).tolist() == [1.0, 1.0]


def test_what_follows_is_made_ahead_and_the_same() -> None:
    asked, wanted = [], [feed()(step) for step in range(4)]

    def source(step: int) -> Batch:
        asked.append(step)
        return batch_of(5)(step)

    found = feed(source=source)
    with found.ahead():
        for step in range(4):
            (rows,) = found(step)
            assert torch.equal(rows.x, wanted[step][0].x)
    assert asked == [0, 1, 2, 3]  # each once, none after the last
    assert found.waited > 0


def test_an_error_in_the_background_is_raised_where_its_step_is() -> None:
    def source(step: int) -> Batch:
        if step == 2:
            raise ValueError("clip 7: cannot be decoded")
        return batch_of(5)(step)

    found = feed(source=source)
    with found.ahead():
        found(0)
        found(1)
        with pytest.raises(ValueError, match="clip 7"):
            found(2)


def test_batches_too_small_to_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a batch of 5 \(generate\) cannot be split over 2 ranks × accumulate = 3; make it larger"):
        feed(0, 2, accumulate=3)

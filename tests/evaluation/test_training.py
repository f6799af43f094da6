"""The training bench, and the configurations of large models: their sizes as they are, their settings at the size of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reelflow.evaluation.training import latent_frames, longest, run, table
from reelflow.flow import StarFlow
from reelflow.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = [
    "about.size=64", "flow.width=32", "flow.deep_width=64", "flow.layers=[1,1,2]", "flow.window=3", "flow.text_tokens=6", "flow.text_dim=8",
    "flow.denoiser={layers: 1, width: 32}", "flow.head_dim=32", "device=cpu",
    "stages=[{steps: 1, buckets: [{task: generate, frames: 3, batch: 4}, {task: edit, frames: 2, batch: 2}, {task: image, batch: 8}]}]",
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("starflow_v_7b", 6_890_096_528), ("starflow_v_1b", 964_355_984)])
def test_the_large_examples_have_their_size(name: str, parameters: int) -> None:
    config = TrainConfig.load(EXAMPLES / f"{name}.yaml")
    with torch.device("meta"):
        flow = StarFlow(config.flow)
    assert sum(p.numel() for p in flow.parameters()) == parameters
    assert longest(config).batch == max(b.batch for stage in config.stages for b in stage.buckets if b.frames == 21)


def test_the_settings_for_one_gpu_run_at_the_size_of_a_test() -> None:
    """8-bit optimiser state, activation checkpointing, parts of a batch, no average."""
    more = ["optimizer=adamw8bit", "ema=0", "accumulate=2", "precision=float32"]
    found = run(TrainConfig.load(EXAMPLES / "starflow_v_7b.yaml", SMALL + more), steps=1)
    assert [row["loop"] for row in found["rows"]] == ["plain PyTorch, AdamW", "reelflow, adamw", "reelflow, adamw8bit"]
    assert found["latents"] == {"frames": 4, "height": 4, "width": 4}  # of an edit both clips
    assert found["tokens"] == 2 * 4 * 16
    assert found["rows"][0]["times_plain"] == {"seconds": 1.0, "cpu_seconds": 1.0}
    assert "reelflow, adamw8bit" in table(found)


def test_recomputing_layers_saves_memory() -> None:
    """What is kept for the way back, counted exactly: with activation checkpointing the layers' inputs only."""
    kept = {}
    for recompute in (False, True):
        config = TrainConfig.load(EXAMPLES / "starflow_v_7b.yaml", [*SMALL, f"recompute={str(recompute).lower()}", "precision=float32"])
        torch.manual_seed(0)
        kept[recompute] = held(config)
    assert kept[True] < 0.5 * kept[False]


def test_memory_grows_with_the_length_of_a_clip_not_with_its_square() -> None:
    config = TrainConfig.load(EXAMPLES / "starflow_v_7b.yaml", [*SMALL, "precision=float32"])
    kept = [held(config, frames) for frames in (4, 8, 16)]
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.01)


def held(config: TrainConfig, frames: int = 3) -> int:
    """Bytes that the graph of one forward pass of the flow keeps, each storage once, without the weights."""
    from reelflow.training.parallel import prepare_layers

    flow = StarFlow(config.flow)
    prepare_layers(flow, config)
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow(torch.randn(1, frames, 48, 4, 4), torch.randn(1, 6, 8))
    return sum(storage.nbytes() for storage in storages.values())


def test_an_edit_is_as_long_as_both_its_clips() -> None:
    config = TrainConfig.load(EXAMPLES / "starflow_v_7b.yaml", SMALL)
    assert latent_frames(longest(config)) == 4

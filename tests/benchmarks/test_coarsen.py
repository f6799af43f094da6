"""A coarser model: near the one it comes from, and made of few values."""

from __future__ import annotations

import sys
from pathlib import Path

import coarsen
import pytest
import torch
from torch import Tensor

import reelflow
from reelflow.adapters import lora
from reelflow.adapters.checkpoint import read_weights
from reelflow.adapters.lora import Lora


def run(source: Path, target: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coarsen.py", str(source), str(target)])
        coarsen.main()


def unit_of(old: Tensor, new: Tensor) -> float:
    """How far apart the new values are: a power of two, of which each is the nearest multiple."""
    unit = new[new != 0].abs().min()
    assert torch.equal(torch.frexp(unit).mantissa, torch.tensor(0.5))
    assert torch.equal((new / unit).round(), new / unit)
    assert (old - new).abs().max() <= unit / 2 + old.abs().max() / 256
    return unit.item()


def test_weights_of_layers_are_multiples_nearby_and_others_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "coarse"
    run(tiny_model, target)
    before, after = (read_weights(folder / "transformer") for folder in (tiny_model, target))
    assert set(before) == set(after)
    for name in before:
        old, new = before[name].float(), after[name].float()
        size = old.square().mean().sqrt()
        if old.ndim == 2 and ".layers." in name and size > 0:
            assert size / 48 < unit_of(old, new) < size / 22
        else:
            assert torch.equal(old, new)
    assert reelflow.load(str(target), "cpu").about == reelflow.load(str(tiny_model), "cpu").about


def test_of_a_lora_all_matrices(tmp_path: Path) -> None:
    given = {f"deep_block.layers.0.mlp.up.lora_{side}.weight": torch.randn(4, 32).bfloat16() for side in "AB"}
    lora.save(tmp_path / "heart.safetensors", given, {"rank": 4, "alpha": 4, "model": "tiny", "revision": "1"})
    run(tmp_path / "heart.safetensors", tmp_path / "coarse.safetensors")
    found = Lora.open(tmp_path / "coarse.safetensors")
    assert found.about == Lora.open(tmp_path / "heart.safetensors").about
    for name, old in given.items():
        size = old.float().square().mean().sqrt()
        assert size / 24 < unit_of(old.float(), found.tensors[name].float()) < size / 10


def test_nothing_is_written_over(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tiny_model, tiny_model)
    assert "exists already" in capsys.readouterr().err

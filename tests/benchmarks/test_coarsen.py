"""A coarser model: near the one it comes from, and made of few values."""

from __future__ import annotations

import sys
from pathlib import Path

import coarsen
import pytest
import torch

import reelflow
from reelflow.adapters.checkpoint import read_weights


def test_weights_of_layers_are_multiples_nearby_and_others_as_they_were(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "coarse"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coarsen.py", str(tiny_model), str(target)])
        coarsen.main()
    before, after = (read_weights(folder / "transformer") for folder in (tiny_model, target))
    assert set(before) == set(after)
    for name in before:
        old, new = before[name].float(), after[name].float()
        size = old.square().mean().sqrt()
        if old.ndim == 2 and ".layers." in name and size > 0:
            unit = new[new != 0].abs().min()
            assert torch.equal(torch.frexp(unit).mantissa, torch.tensor(0.5))
            assert (old - new).abs().max() <= unit / 2 + old.abs().max() / 256
            assert size / 48 < unit < size / 22
        else:
            assert torch.equal(old, new)
    assert reelflow.load(str(target), "cpu").about == reelflow.load(str(tiny_model), "cpu").about


def test_nothing_is_written_over(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["coarsen.py", str(tiny_model), str(tiny_model)])
        coarsen.main()
    assert "exists already" in capsys.readouterr().err

"""Decoding against diffusers: the same pixels."""

from __future__ import annotations

import decoding
import pytest


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_minis_codec_gives_the_pixels_of_diffusers(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setitem(decoding.CASES, "mini's", (decoding.mini, (2, 2, 2)))
    row = decoding.measure("mini's", precision, 1)
    assert row["frames"] == 5
    assert len(decoding.cells(row)) == len(decoding.COLUMNS)
    assert 0 < row["error"] < (1e-2 if precision == "float32" else 20)

"""What the published 7 B model needs, counted on tensors without values: it fits 24 GB, and 12."""

from __future__ import annotations

import budget as script
import pytest
from rig import FULL, PUBLISHED

from reelflow.pipelines.account import Way, Wish


@pytest.mark.slow
def test_the_published_model_fits_24_and_12_gigabytes() -> None:
    account, wish = script.published(), Wish(*FULL.latents, guidance=True)
    whole = Way("bfloat16")
    held = account.weights(whole)
    assert held["flow"] + held["denoiser"] > 2 * 6_890_096_528  # projections are float32
    slots = 21 * 30 * 53 + 128 + PUBLISHED.text_tokens
    assert 0 <= account.cache(whole, wish)[0] - 2 * 24 * 2 * slots * 4096 * 2 < 1000  # keys, values; guidance; bfloat16
    needs = {
        24e9: (Way("int8", cache="bytes", turns=True), Way("bfloat16", cache="host", turns=True)),
        12e9: (Way("int4", cache="host", turns=True, codec="bfloat16"), Way("bfloat16", "host", "host", True, "bfloat16")),
    }
    for size, ways in needs.items():
        for way in ways:
            assert account.need(way, wish) < size, way
    lines = script.picked(account, {"guidance": wish}, "bfloat16")
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(script.BUDGETS)
    assert "| int8 (approximate), cache in 8 bits (approximate), each part on the device only while it is used |" in lines[3]
    assert "| bfloat16 |" in lines[-1]

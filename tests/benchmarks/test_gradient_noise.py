"""What is told of a gradient's noise: what the sums come to where true gradient and noise are known."""

from __future__ import annotations

import pytest
import torch
from gradient_noise import products


def test_products_tell_signal_and_what_opposite_noise_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    true, count = torch.randn(20_000, generator=generator), 8
    odd, even = ([spread * torch.randn(20_000, generator=generator) for _ in range(count)] for spread in (2.0, 0.5))
    one, opposite = ([true + sign * a + b for a, b in zip(odd, even, strict=True)] for sign in (1, -1))
    squares, signal = (value / 20_000 for value in products(one, one))
    beside, _ = (value / 20_000 for value in products(one, opposite))
    assert signal == pytest.approx(1.0, abs=0.1)
    assert squares == pytest.approx(1 + 4 + 0.25, rel=0.05)
    assert (squares + beside) / 2 == pytest.approx(1 + 0.25, rel=0.05)  # of the noise only what is even in it

"""Quantised layers of a flow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reelflow.adapters.hub import PACKAGED
from reelflow.adapters.precision import quantiser
from reelflow.config import FlowConfig
from reelflow.flow.model import StarFlow


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rows_of_zeros_stay_zeros(precision: str) -> None:
    """Of weights, as heads have them that never learned to look anywhere, and of inputs: a scale from the largest value would be 0."""
    pytest.importorskip("torchao")
    flow = StarFlow(FlowConfig.read(PACKAGED / "mini" / "transformer" / "config.json"))
    name, linear = next((name, module) for name, module in flow.named_modules() if ".layers." in name and isinstance(module, nn.Linear))
    linear = linear.bfloat16().requires_grad_(False)
    torch.manual_seed(0)
    linear.weight.copy_(torch.randn_like(linear.weight))
    linear.weight[3] = 0
    x = torch.randn(5, linear.in_features).bfloat16()
    x[2] = 0
    wanted = linear(x)
    quantise = quantiser(flow, precision, "cpu")
    assert quantise is not None
    quantise(name, linear)
    found = linear(x)
    assert torch.equal(found[:, 3], wanted[:, 3])
    assert torch.equal(found[2], wanted[2])
    torch.testing.assert_close(found, wanted, atol=0.15 * float(wanted.std()), rtol=0)

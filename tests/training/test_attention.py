"""Attention in tiles against torch's in float64, and what it keeps for the way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reelflow.config import FlowConfig
from reelflow.flow import attention as flow
from reelflow.flow.attention import Layer
from reelflow.training.attention import TILE, attend_quickly, attention, causal

KINDS = {"causal": (causal, True), "full": (attention, False)}


def drawn(queries: int, keys: int, kv_heads: int = 2) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values that bfloat16 holds, and a slope."""
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = ((2, queries), (kv_heads, keys), (kv_heads, keys), (2, queries))
    *given, slope = (torch.randn(3, heads, length, 16, generator=generator).bfloat16().float() for heads, length in sizes)
    return given, slope


def results(run: Callable[..., Tensor], given: list[Tensor], slope: Tensor) -> list[Tensor]:
    """What attention gives, and the slopes of its inputs."""
    inputs = [x.clone().requires_grad_() for x in given]
    mixed = run(*inputs)
    mixed.backward(slope.to(mixed.dtype))
    return [mixed.detach().double(), *(x.grad.double() for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("tokens", [1, 5, TILE, TILE + 1, 2 * TILE + 30])
def test_tiles_give_what_torch_gives(kind: str, tokens: int) -> None:
    run, is_causal = KINDS[kind]
    given, slope = drawn(tokens, tokens if is_causal else tokens + 7)
    wanted = results(lambda *x: F.scaled_dot_product_attention(*x, is_causal=is_causal), [x.double() for x in given], slope)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(run, given, slope)
    for own, true in zip(found, wanted, strict=True):
        assert (own - true).norm() <= 0.01 * true.norm() + 1e-6


def test_what_is_kept_grows_with_the_length() -> None:
    kept: list[int] = []
    given, _ = drawn(5 * TILE, 5 * TILE)

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        causal(*(x.requires_grad_() for x in given))
    assert sum(kept) == sum(x.numel() for x in given)


def test_elsewhere_it_is_torchs() -> None:
    """Without autocast, and where key heads are shared."""
    given, _ = drawn(9, 9)
    assert torch.equal(causal(*given), flow.causal(*given))
    assert torch.equal(attention(*given), flow.attention(*given))
    given, _ = drawn(9, 9, kv_heads=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal(*given), flow.causal(*given))


def test_slopes_of_a_layer_are_no_further_from_the_true_ones_than_with_torchs_attention() -> None:
    torch.manual_seed(0)
    layer = Layer(FlowConfig(channels=4, width=64, deep_width=64, layers=(1, 1), head_dim=32, position_span=4), 64)
    x_BTM, slope = torch.randn(2, 2, 200, 64)

    def slopes(precise: bool) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            layer(x_BTM, None, flow.causal).backward(slope)
        return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])

    true, usual = slopes(True), slopes(False)
    attend_quickly(layer)
    quick = slopes(False)
    assert not torch.equal(quick, usual)
    assert (quick - true).norm() < 1.2 * (usual - true).norm() < 0.02 * true.norm()

"""The map x ↔ z: exactly invertible, its log-determinant, who depends on whom, and how many parameters it has.

Shapes: B batch, F latent frames, S places of a frame, C channels, h × w places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reelflow.adapters
from reelflow.adapters.checkpoint import load_into, save_weights
from reelflow.adapters.reference import config_from_arguments
from reelflow.config import FlowConfig
from reelflow.flow import StarFlow, from_tokens, order, to_tokens
from reelflow.sampling import Schedule, sample
from reelflow.training.loss import nll, score_loss

SIZES = {
    "channels", "width", "deep_width", "layers", "head_dim", "window", "text_tokens", "text_dim", "position_span", "noise_std", "denoiser",
}  # fmt: skip


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂ function / ∂ x, shape (*output, *input)."""
    return torch.autograd.functional.jacobian(function, x, vectorize=True)


def test_the_options_cover_the_configuration(options: dict[str, dict[str, Any]]) -> None:
    """A new key of FlowConfig needs a flow here, so that all tests of the mathematics run with it."""
    assert set(FlowConfig.model_fields) - SIZES == {key for changes in options.values() for key in changes} - SIZES


def test_round_trip(tiny: Any) -> None:
    z = tiny.model(tiny.x, tiny.text).z
    for schedule in (Schedule("sequential"), Schedule("jacobi", tolerance=0.0)):
        back, _ = sample(tiny.model, z, tiny.text, schedule=schedule)
        torch.testing.assert_close(back, tiny.x, atol=1e-9, rtol=0)


def test_log_det_is_that_of_the_jacobian(tiny: Any) -> None:
    x, text = tiny.x[:1], None if tiny.text is None else tiny.text[:1]
    found = tiny.model(x, text)
    sign, wanted = torch.linalg.slogdet(jacobian(lambda x: tiny.model(x, text).z, x).reshape(x.numel(), x.numel()))
    assert found.log_det.shape == x.shape
    assert sign == 1
    torch.testing.assert_close(found.log_det.sum(), wanted, atol=1e-9, rtol=0)


def test_a_frame_depends_on_all_frames_before_it_and_none_after(build: Callable) -> None:
    model, x, text = build(batch=1)
    moves = jacobian(lambda x: model(x, text).z, x)[0, :, :, :, :, 0].abs().sum((1, 2, 3, 5, 6, 7)) > 0
    assert torch.equal(moves, torch.ones_like(moves).tril())


@pytest.mark.parametrize("name", ["deep_block", "shallow_blocks.0", "shallow_blocks.1"])
def test_parameters_depend_on_the_places_before_them_only(build: Callable, name: str) -> None:
    """In the block's own token order: reversed inside the frame in even blocks; shallow blocks never see another frame."""
    model, x, text = build(batch=1, layers=(1, 1, 1, 1) if name == "deep_block" else (1, 1, 1))
    block, size = model.get_submodule(name), x.shape[-2:]

    def parameters(x: Tensor) -> Tensor:
        return order(torch.cat(model.affine(block, order(x, block), size, text), -1), block).flatten(1, 2)

    x_BFSC = to_tokens(x)
    frames, places = x_BFSC.shape[1:3]
    moves = jacobian(parameters, x_BFSC)[0, :, :, 0].flatten(2, 3).abs().sum((1, 3)) > 0
    wanted = torch.ones(frames * places, frames * places).tril(-1).bool()
    if block is not model.deep_block:
        wanted &= torch.block_diag(*[torch.ones(places, places)] * frames).bool()
    assert torch.equal(moves, wanted)


def test_blocks_alternate_their_token_order() -> None:
    with torch.device("meta"):
        model = StarFlow(FlowConfig(channels=2, width=16, deep_width=16, head_dim=16, layers=(1,) * 6, position_span=4))
    assert [block.reverse for block in (*model.shallow_blocks, model.deep_block)] == [True, False, True, False, True, False]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_positions_belong_to_the_place_in_the_sequence(build: Callable, options: dict[str, dict[str, Any]], kind: str) -> None:
    """A reversed block is the same block on flipped tokens: its t-th token has raster position t."""
    model, x, _ = build(**options[kind])
    block, x_BFSC, size = model.shallow_blocks[0], to_tokens(x), x.shape[-2:]
    assert block.reverse
    found = model.affine(block, x_BFSC, size, None)
    block.reverse = False
    for part, wanted in zip(found, model.affine(block, x_BFSC.flip(2), size, None), strict=True):
        assert torch.equal(part, wanted.flip(2))


def test_learned_positions_are_reordered_with_the_tokens(build: Callable, options: dict[str, dict[str, Any]]) -> None:
    model, _, _ = build(**options["learned positions"])
    for block in model.shallow_blocks:
        inputs = torch.zeros(1, 6, 2).double()
        wanted = block.pos_embed.flip(0) if block.reverse else block.pos_embed
        torch.testing.assert_close(block.embed(inputs, torch.arange(6))[0], wanted + block.proj_in.bias)


def test_without_start_token_the_first_token_stays(build: Callable) -> None:
    model, x, text = build(sos=False, layers=(1,))
    out = model(x, text)
    first = model.config.window - 3  # frame 0; one deep block, index 0: reversed inside the frame
    assert torch.equal(out.z[:, first, :, -1, -1], x[:, first, :, -1, -1])
    assert torch.equal(out.log_det[:, first, :, -1, -1], torch.zeros(2, 2).double())


def test_untrained_flow_is_the_identity(build: Callable) -> None:
    _, x, text = build()
    out = StarFlow(FlowConfig(**build().model.config.model_dump())).double()(x, text)
    torch.testing.assert_close(out.z, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(out.log_det, torch.zeros_like(x), atol=1e-12, rtol=0)


def test_tokens_are_places_in_raster_order() -> None:
    x = torch.arange(2 * 3 * 2 * 4 * 5).reshape(2, 3, 2, 4, 5)
    assert torch.equal(to_tokens(x)[1, 2, 2 * 5 + 3], x[1, 2, :, 2, 3])
    assert torch.equal(from_tokens(to_tokens(x), 4, 5), x)


def test_save_and_load(tiny: Any, tmp_path: Path) -> None:
    save_weights(tiny.model.state_dict(), tmp_path, max_shard_bytes=20_000)
    tiny.model.config.write(tmp_path / "config.json")
    with torch.device("meta"):
        again = StarFlow(FlowConfig.read(tmp_path / "config.json"))
    load_into(again, tmp_path)
    saved, loaded = tiny.model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    for found, wanted in zip(again(tiny.x, tiny.text), tiny.model(tiny.x, tiny.text), strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=1e-10)  # last bits may follow from where in memory factors are


def test_every_parameter_gets_a_gradient(tiny: Any) -> None:
    model, x, text = tiny
    nll(model, x, text).mean().backward()
    if model.denoiser:
        score_loss(model, x, torch.ones_like(x), text).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_half_precision_keeps_the_projections_and_stays_close(tiny: Any) -> None:
    model, x = tiny.model.float(), tiny.x.float()
    text = None if tiny.text is None else tiny.text.float()
    wanted = model(x, text)
    found = model.set_precision(torch.bfloat16)(x, text)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    outside = {name for name, kind in kinds.items() if kind == torch.float32}
    assert {name for name in kinds if "proj_" in name or "norm" in name or "sos" in name} <= outside
    assert {name for name in kinds if any(part in name for part in ("qkv", "attention.proj", "up", "gate", "down"))}.isdisjoint(outside)
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert ((got - exact).abs() / (1 + exact.abs())).mean() < 0.1
    assert found.z.ne(wanted.z).any()


@pytest.mark.parametrize(
    ("name", "total", "deep", "denoiser"),
    [
        ("starflow-v_7B_t2v_caus_480p", 6_890_096_528, 4_842_107_024, 912_884_784),
        ("starflow_3B_t2i_256x256", 3_858_281_544, None, 0),
    ],
)
def test_published_parameter_counts(name: str, total: int, deep: int | None, denoiser: int) -> None:
    published = Path(reelflow.adapters.__file__).with_name("published.json")
    _, config = config_from_arguments(json.loads(published.read_text(encoding="utf-8"))[name])
    with torch.device("meta"):
        model = StarFlow(config)

    def count(module: torch.nn.Module | None) -> int:
        return sum(parameter.numel() for parameter in module.parameters()) if module else 0

    assert count(model) == total
    assert count(model.denoiser) == denoiser
    if deep:
        assert count(model.deep_block) == deep
        assert [count(block) for block in model.shallow_blocks] == [227_020_944] * 5


def test_no_mask_over_the_whole_sequence(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 33,390 tokens a dense mask would not fit: none has more than 256 rows, in any pass, also of a long prefix."""
    rows: list[int] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        rows.append(0 if attn_mask is None else attn_mask.shape[-2])
        return real(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, _, text = build(batch=1)
    x = torch.randn(1, 3, 2, 16, 17).double()
    model(x, text)
    model.score(x, text)
    assert set(rows) == {0}
    sample(model, x, text, prefix_BFChw=x[:, :2], schedule=Schedule("jacobi", tolerance=0.1, window=400))
    assert 100 < max(rows) <= 256

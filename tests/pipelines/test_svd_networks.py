"""The rearranged networks give diffusers' numbers: each saving alone, in float64, and all together."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from reelflow.adapters.svd import load_parts
from reelflow.pipelines.svd import Diffusion, SvdPipeline, blocks
from reelflow.pipelines.svd.attention import SelfAttention, Transformer
from reelflow.pipelines.svd.blocks import Columns, Convolution, Given, Residual, Upsample, group_norm
from reelflow.pipelines.svd.decoder import Decoder
from reelflow.pipelines.svd.unet import Denoiser

tiny = runpy.run_path(str(Path(__file__).with_name("svd_tiny.py")))
FRAMES = 3
PIECES = pytest.mark.parametrize("piece", [1, 40_000, 2**40], ids=["smallest pieces", "some pieces", "whole"])


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.set_grad_enabled(False)


@pytest.fixture(autouse=True)
def _after():
    yield
    torch.set_grad_enabled(True)


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    return tiny["spread"](module, seed).double()


def noise(*shape: int) -> Tensor:
    """Channels-last where it is a picture, as the networks keep it."""
    x = torch.randn(shape).double()
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def given(frames: int, **tables: Tensor) -> Given:
    empty = torch.zeros(2, 0).double()
    return Given(frames, tables.get("biases", empty[0]), tables.get("context", empty), tables.get("positions", empty))


def test_attention_to_one_key_is_a_constant() -> None:
    block = double(TemporalBasicTransformerBlock(32, 32, 2, 16, cross_attention_dim=24))
    attention, states = SelfAttention(block, Columns()), noise(2, 24)
    asked = block.attn2(noise(2, 5, 32), encoder_hidden_states=states[:, None])
    assert asked.std() > 0.05
    constant = attention.context(states) - block.attn1.to_out[0].bias
    assert (asked - constant[:, None]).abs().max() < 1e-14


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (5, 3)])
def test_enlargement_by_phases_is_exact_to_the_borders(size: tuple[int, int]) -> None:
    source = double(Upsample2D(8, use_conv=True, out_channels=12))
    x = noise(2, 8, *size)
    wanted = source(x)
    assert (Upsample(source)(x) - wanted).abs().max() < 1e-14
    assert wanted.shape == (2, 12, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("rows", [4, 7, 8, 13])
@pytest.mark.parametrize("piece", [1, 3 * 4 * 10 * 32 * 9, 2**40], ids=["four rows", "some rows", "whole"])
def test_convolution_by_half_the_products(rows: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the borders, for any number of rows, and about as exact as the usual sum."""
    monkeypatch.setattr(blocks.winograd, "pays", lambda x, weight: True)
    monkeypatch.setattr(blocks, "CPU_PIECE", piece)
    conv = nn.Conv2d(32, 40, 3, padding=1)
    x, bias = noise(5, 32, rows, 9).float(), torch.randn(40)
    asked = F.conv2d(x.double(), conv.weight.double(), bias.double(), padding=1)
    got = Convolution(conv)(x, bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - asked).abs().max() < 2e-5 < asked.std()
    stride = nn.Conv2d(32, 40, 3, 2, padding=1)
    torch.testing.assert_close(Convolution(stride)(x), stride(x))


def test_convolution_by_half_the_products_only_where_it_is_quicker() -> None:
    x, weight = torch.empty(1, 64, 128, 256), torch.empty(64, 64, 3, 3)
    assert blocks.winograd.pays(x, weight)
    for other in (x.bfloat16(), x.double(), x.to("meta")):
        assert not blocks.winograd.pays(other, weight)
    assert not blocks.winograd.pays(x[:, :, :32], weight)  # little work
    assert not blocks.winograd.pays(torch.empty(1, 64, 5, 8192), weight)  # five rows cost as much as eight
    assert not blocks.winograd.pays(torch.empty(1, 512, 128, 256), torch.empty(16, 512, 3, 3))  # the other sums cost too much
    assert not blocks.winograd.pays(torch.empty(1, 1024, 16, 32), torch.empty(1024, 1024, 3, 3))  # the kernel's sums cost too much


def test_convolution_over_time_is_one_in_two_dimensions() -> None:
    source = nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)).double()
    x = noise(2, 8, 5, 4, 3)
    flat = Convolution(source)(x.flatten(3))
    assert (flat.unflatten(3, (4, 3)) - source(x)).abs().max() < 1e-14


@PIECES
@pytest.mark.parametrize("switched", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_residual_blocks(piece: int, switched: bool, eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blend in the weights, time in the biases, group norms over time by pieces."""
    monkeypatch.setattr(blocks, "CPU_PIECE", piece)
    source = double(
        SpatioTemporalResBlock(
            32, 64, temb_channels=16, eps=1e-6, merge_strategy="learned_with_images", switch_spatial_to_temporal_mix=switched
        )
    )
    columns, x, time = Columns(), noise(2 * FRAMES, 32, 6, 8), noise(16)
    ours = Residual(source, columns)
    biases = torch.cat(ours.biases(F.silu(time)))
    assert len(biases) == columns.total
    out = ours(x, given(FRAMES, biases=biases)._replace(eps=eps))
    if eps is not None:
        for norm in source.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.eps = eps
    wanted = source(x, time.expand(2 * FRAMES, 16), torch.zeros(2, FRAMES).double())
    assert wanted.std() > 0.1
    assert (out - wanted).abs().max() < 1e-12


def test_moments_by_pieces_do_not_cancel() -> None:
    """Values far from zero, float32: as exact as the norm of the whole, which is held against float64."""
    norm = nn.GroupNorm(32, 64)
    x = torch.randn(1, 64, 4, 500) + 1000
    wanted = F.group_norm(x.double(), 32, eps=1e-5)
    scale, shift = (each.view(1, -1, 1, 1) for each in blocks._affine(x.split(60, 3), norm, 1e-5))
    assert (x * scale + shift - wanted).abs().max() < 1e-2
    assert (F.group_norm(x, 32) - wanted).abs().max() < 1e-2
    scale, shift = (each.view(1, -1, 1, 1) for each in blocks._affine((x - 1000).split(60, 3), norm, 1e-5))
    assert ((x - 1000) * scale + shift - F.group_norm(x - 1000, 32)).abs().max() < 1e-5


@PIECES
def test_transformers(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_PIECE", piece)
    source = double(TransformerSpatioTemporalModel(2, 16, in_channels=32, num_layers=2, cross_attention_dim=24))
    places, context = Columns(), Columns()
    ours, x, states = Transformer(source, places, context), noise(2 * FRAMES, 32, 6, 8), noise(2, 24)
    attentions = [block.attention for block in (*ours.spatial, *ours.temporal)]
    tables = {"context": torch.cat([each.context(states) for each in attentions], 1), "positions": ours.positions(FRAMES)}
    assert [tables["context"].shape[1], tables["positions"].shape[1]] == [context.total, places.total]
    before = x.clone()
    out = ours(x, given(FRAMES, **tables))
    wanted = source(x, states.repeat_interleave(FRAMES, 0)[:, None], torch.zeros(2, FRAMES).double()).sample
    assert torch.equal(x, before), "what a skip connection still holds is not changed"
    assert (out - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("clips", [1, 2])
def test_the_unet(guided: bool, clips: int) -> None:
    """Every step of a schedule from one table."""
    unet = double(tiny["tiny_unet"]())
    ids, times = [6.0, 127.0, 0.02], torch.tensor([1.6, 0.3, -1.5])
    latents, picture, states = noise(clips, FRAMES, 4, 8, 16), noise(clips, 4, 8, 16), noise(clips, tiny["STATES"])
    shown, told = ((torch.cat((torch.zeros_like(x), x)) if guided else x) for x in (picture, states))
    rows = len(shown)
    seen = torch.cat((latents.repeat(rows // clips, 1, 1, 1, 1), shown[:, None].expand(-1, FRAMES, -1, -1, -1)), 2)
    denoiser = Denoiser(unet)
    conditions = denoiser.conditions(picture, states, ids, times, FRAMES, guided, None)
    for step, time in enumerate(times):
        wanted = unet(seen, time, told[:, None], torch.tensor([ids] * rows)).sample
        assert wanted.std() > 0.05
        assert (denoiser(latents, conditions, torch.tensor([step]))[0] - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("piece", [20_000, 2**40], ids=["pieces", "whole"])
def test_the_decoder(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_PIECE", piece)
    vae = tiny["tiny_vae"]()
    latents = torch.randn(2, FRAMES, 4, 4, 8)
    shares = []
    ours = Decoder(vae)(latents * vae.config.scaling_factor, shares.append)
    for clip, wanted in zip(ours, latents, strict=True):
        assert (clip - vae.decode(wanted, num_frames=FRAMES).sample).abs().max() < 2e-5
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_half_precision_keeps_the_encoder_whole(tmp_path: Path) -> None:
    """It is never recast, and the clip is close to the one in float32."""
    folder = tiny["write_tiny"](tmp_path / "model")
    half, full = (SvdPipeline(load_parts(folder, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.float32}
    for part in (half.denoiser, half.decoder, half.image_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    picture = (torch.rand(64, 64, 3) * 255).byte().numpy()
    a, b = (pipe.animate(picture, seed=1, sampling=Diffusion(steps=2)).frames.astype(float) for pipe in (half, full))
    assert 0 < abs(a - b).mean() < 4, "levels of 255"
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.float32}


def test_nothing_of_the_sources_is_held_twice() -> None:
    """What is not changed is shared; dead weights are let go: queries and keys of cross-attention, norms before it."""
    unet = tiny["tiny_unet"]()
    shared = {parameter.data_ptr() for parameter in unet.parameters()}
    held = sum(parameter.numel() for parameter in unet.parameters())
    denoiser = Denoiser(unet)
    assert any(parameter.data_ptr() in shared for parameter in denoiser.parameters())
    assert sum(parameter.numel() for parameter in denoiser.parameters()) < 1.05 * held


@pytest.mark.parametrize("shape", [(3, 64, 4, 8), (2, 320, 4, 4), (1, 640, 2, 4), (1, 64, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_any_shape_stay_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(32, shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 * torch.randn(shape) + 2).to(dtype).contiguous(memory_format=torch.channels_last)
    found = group_norm(x, norm.to(dtype), 1e-5)
    wanted = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    close = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), wanted, atol=close, rtol=close)

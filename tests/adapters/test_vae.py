"""Codecs over tiny VAEs with random weights: the scalings are exact inverses, the published quirk holds, sizes are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from reelflow.adapters import wan
from reelflow.adapters.vae import Codec, ImageCodec, VideoCodec, load_codec
from reelflow.adapters.wan_fast import IM2COL, PAIRED, WanPass

SCALE = 0.6


TINY = {
    "base_dim": 8,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
OLDER = {"is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None, "scale_factor_spatial": 8}
"""What Wan 2.1 has otherwise."""


def new_vae(**config: object) -> AutoencoderKLWan:
    """Norms and biases random, so that a mistake in them shows."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    mean, std = torch.randn(6, generator=generator), 0.5 + torch.rand(6, generator=generator)
    vae = AutoencoderKLWan(**TINY | {"latents_mean": mean.tolist(), "latents_std": std.tolist()} | config)
    for parameter in vae.requires_grad_(False).eval().parameters():
        if parameter.shape[1:].numel() == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vae


@pytest.fixture(scope="module")
def wan_vae() -> AutoencoderKLWan:
    return new_vae()


@pytest.fixture
def video(wan_vae: AutoencoderKLWan) -> VideoCodec:
    return VideoCodec(wan_vae, SCALE)


@pytest.fixture(scope="module")
def image_vae() -> AutoencoderKL:
    torch.manual_seed(3)
    blocks = 4
    return AutoencoderKL(
        block_out_channels=[16] * blocks,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        norm_num_groups=8,
    )


def clip(frames: int = 9, height: int = 16, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def posterior(vae: AutoencoderKLWan, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, f, C, h, w) by diffusers' own loop."""
    found = vae.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist
    return found.mean.transpose(1, 2), found.std.transpose(1, 2)


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    return torch.tensor(vae.config.latents_mean).view(-1, 1, 1), torch.tensor(vae.config.latents_std).view(-1, 1, 1)


@torch.no_grad()
def test_encode_is_the_standardised_mean_with_later_frames_scaled(video: VideoCodec) -> None:
    frames = clip()
    mean, _ = posterior(video.vae, frames)
    shift, scale = statistics(video.vae)
    expected = (mean - shift) / scale * torch.tensor([1, SCALE, SCALE]).view(-1, 1, 1, 1)
    latents = video.encode(frames)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, 3, 6, 1, 2)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sampling_adds_noise_that_is_not_divided_by_the_latents_std(video: VideoCodec) -> None:
    frames = clip()
    _, std = posterior(video.vae, frames)
    drawn = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(2, 6, 1, 2, generator=drawn) for _ in range(3)], 1)
    added = video.encode(frames, torch.Generator().manual_seed(5)) - video.encode(frames)
    expected = std * noise * torch.tensor([1, SCALE, SCALE]).view(-1, 1, 1, 1)
    torch.testing.assert_close(added, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_posterior_is_what_encode_samples_from(video: VideoCodec) -> None:
    frames = clip()
    wanted_mean, wanted_std = posterior(video.vae, frames)
    shift, scale = statistics(video.vae)
    mean, std = video.posterior(frames)
    torch.testing.assert_close(mean, (wanted_mean - shift) / scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, wanted_std, atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_a_clip_and_its_beginning_the_same_noise(video: VideoCodec) -> None:
    frames = clip(9, batch=1)
    whole, beginning = (video.encode(part, torch.Generator().manual_seed(6)) for part in (frames, frames[:, :5]))
    torch.testing.assert_close(whole[:, :2], beginning, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decode_undoes_the_scaling(video: VideoCodec) -> None:
    frames = clip()
    mean, _ = posterior(video.vae, frames)
    expected = video.vae.decode(mean.transpose(1, 2)).sample.permute(0, 2, 3, 4, 1)
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round()
    decoded = video.decode(video.encode(frames))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == frames.shape
    assert (decoded.float() - expected).abs().max() <= 1


def test_decoding_frame_by_frame_is_the_same_and_causal(video: VideoCodec) -> None:
    latents = torch.randn(1, 3, 6, 1, 2)
    pieces = list(video.decode_frames(latents.unbind(1)))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    whole = video.decode(latents)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(video.decode(latents[:, :2]), whole[:, :5])
    stream, other = video.decode_frames(latents.unbind(1)), video.decode_frames(latents.unbind(1))  # two at once do not disturb each other
    mixed = [(next(stream), next(other)) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in mixed)
    assert torch.equal(torch.cat([a for a, _ in mixed], 1), whole)


def pixels_in_chunks(vae: AutoencoderKLWan, latents: Tensor, chunks: tuple[int, ...]) -> Tensor:
    stream = WanPass(vae, stream=True)
    return torch.cat([stream.decode(chunk) for chunk in latents.split(chunks, 2)], 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "config",
    [{"base_dim": PAIRED // 4}, OLDER, {"dim_mult": [4, 4, 2, 1]}],
    ids=["2.2", "2.1", "narrowing"],
)
@torch.no_grad()
def test_a_stream_gives_what_diffusers_gives(config: dict, batch: int) -> None:
    """Single small clips take other kernels than several, even numbers of frames others than odd ones."""
    vae = new_vae(**config)
    x = torch.rand(batch, 3, 13, 32, 48, generator=torch.Generator().manual_seed(8)) * 2 - 1
    moments = vae.encode(x).latent_dist.parameters
    latents = torch.randn(batch, 6, 4, *moments.shape[3:], generator=torch.Generator().manual_seed(9))
    pixels = vae.decode(latents).sample
    assert pixels.abs().lt(1).float().mean() > 0.9, "hardly anything is clipped"
    stream = WanPass(vae, stream=True)
    found = torch.cat([stream.encode(chunk) for chunk in x.split((1, 4, 8), 2)], 2)
    assert (found - moments).abs().max() < 1e-5 * moments.abs().max()
    for chunks in ((1, 1, 1, 1), (3, 1), (1, 2, 1)):
        assert (pixels_in_chunks(vae, latents, chunks).clamp(-1, 1) - pixels).abs().max() < 1e-5


@torch.no_grad()
def test_one_large_clip_takes_the_kernels_of_large_clips() -> None:
    vae = new_vae(base_dim=PAIRED // 4)
    latents = torch.randn(1, 6, 3, 22, 1, generator=torch.Generator().manual_seed(10))
    assert PAIRED * 4 * 4 * 22 > IM2COL
    pixels = vae.decode(latents).sample
    assert (pixels_in_chunks(vae, latents, (1, 1, 1)).clamp(-1, 1) - pixels).abs().max() < 1e-5


@torch.no_grad()
def test_rounding_in_half_precision_is_that_of_diffusers() -> None:
    """Against float32, in grey levels: no more than half again what diffusers itself is off by."""
    vae, latents = new_vae(base_dim=PAIRED // 4), torch.randn(2, 6, 3, 3, 4, generator=torch.Generator().manual_seed(11))
    exact, half = vae.decode(latents).sample, new_vae(base_dim=PAIRED // 4).to(torch.bfloat16)
    theirs = half.decode(latents.bfloat16()).sample.float() - exact
    ours = pixels_in_chunks(half, latents.bfloat16(), (1, 1, 1)).float().clamp(-1, 1) - exact
    assert 0 < ours.square().mean() < 1.5**2 * theirs.square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        cast = pixels_in_chunks(vae, latents, (1, 1, 1)).float().clamp(-1, 1) - exact
    assert 0 < cast.square().mean() < 1.5**2 * theirs.square().mean()


@torch.no_grad()
def test_memory_stays_after_the_second_latent_frame(wan_vae: AutoencoderKLWan) -> None:
    stream, latent, picture = WanPass(wan_vae, stream=True), torch.randn(1, 6, 1, 2, 3), torch.rand(1, 3, 4, 32, 48)

    def held() -> list[tuple[int, tuple[int, ...]]]:
        return [(x.data_ptr(), x.shape) for kept in (stream._past, stream._buffers) for x in kept.values()]

    stream.decode(latent)
    stream.encode(picture[:, :, :1])
    stream.decode(latent)
    stream.encode(picture)
    before = held()
    for _ in range(2):
        stream.decode(latent)
        stream.encode(picture)
    assert held() == before


def test_half_precision_still_gives_float32_latents(wan_vae: AutoencoderKLWan, tmp_path: Path) -> None:
    wan_vae.save_pretrained(tmp_path)
    codec = load_codec(tmp_path, SCALE, dtype=torch.bfloat16)
    exact = load_codec(tmp_path, SCALE)
    latents = codec.encode(clip(5))
    assert codec.vae.dtype == torch.bfloat16
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(clip(5)), atol=0.05, rtol=0.05)
    assert codec.decode(latents).shape == (2, 5, 16, 32, 3)


def test_published_sizes(video: VideoCodec) -> None:
    assert (video.spatial_factor, video.temporal_factor, video.channels) == (16, 4, 6)
    assert video.latent_shape(81, 480, 848) == (21, 30, 53)
    assert video.latent_shape(1, 16, 16) == (1, 1, 1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((80, 480, 848), "frames = 80: must be 1 + 4k for this model; nearest: 77 or 81"),
        ((0, 480, 848), "frames = 0: must be 1 + 4k for this model; nearest: 1"),
        ((81, 470, 848), "height = 470: must be a multiple of 16 for this model; nearest: 464 or 480"),
        ((81, 480, 1), "width = 1: must be a multiple of 16 for this model; nearest: 16"),
    ],
)
def test_sizes_it_cannot_take_name_the_nearest(video: VideoCodec, size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match="nearest") as error:
        video.latent_shape(*size)
    assert str(error.value) == message


def test_wrong_tensors(video: VideoCodec) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(B, F, H, W, 3\)"):
        video.encode(clip().float())
    with pytest.raises(ValueError, match="frames = 8"):
        video.encode(clip(8))
    with pytest.raises(ValueError, match=r"expected \(B, 6, h, w\)"):
        video.decode(torch.zeros(1, 2, 5, 2, 2))


@torch.no_grad()
def test_image_codec_multiplies_the_posterior_by_the_published_factor(image_vae: AutoencoderKL) -> None:
    codec = ImageCodec(image_vae)
    assert (codec.spatial_factor, codec.temporal_factor, codec.channels) == (8, 1, 4)
    frames = clip(2, 16, 24)
    found = image_vae.encode(frames.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    latents = codec.encode(frames)
    torch.testing.assert_close(latents.flatten(0, 1), 0.18215 * found.mean, atol=1e-5, rtol=1e-5)
    drawn = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(2, 4, 2, 3, generator=drawn) for _ in range(2)], 1)
    added = codec.encode(frames, torch.Generator().manual_seed(5)) - latents
    torch.testing.assert_close(added, 0.18215 * found.std.unflatten(0, (2, 2)) * noise, atol=1e-5, rtol=1e-4)
    expected = ((image_vae.decode(found.mean).sample.clamp(-1, 1) + 1) * 127.5).round()
    assert (codec.decode(latents).flatten(0, 1).permute(0, 3, 1, 2).float() - expected).abs().max() <= 1


def test_folders_of_both_kinds_load(wan_vae: AutoencoderKLWan, image_vae: AutoencoderKL, tmp_path: Path) -> None:
    for vae, kind, scale in ((wan_vae, VideoCodec, SCALE), (image_vae, ImageCodec, 1.0)):
        codec: Codec = kind(vae, scale)
        codec.save(tmp_path / kind.__name__)
        loaded = load_codec(tmp_path / kind.__name__, scale)
        assert type(loaded) is kind
        torch.testing.assert_close(loaded.encode(clip(5)), codec.encode(clip(5)), atol=1e-5, rtol=1e-5)


def test_older_image_vaes_load(image_vae: AutoencoderKL, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """sd-vae-ft-ema was saved before diffusers renamed the tensors of its attention."""
    image_vae.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in image_vae.state_dict().items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor.contiguous()
    assert sum("proj_attn" in name for name in state) == 4
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    codec = load_codec(tmp_path)
    assert torch.equal(codec.encode(clip(1)), ImageCodec(image_vae).encode(clip(1)))
    assert capfd.readouterr() == ("", "")


def test_incomplete_folders(wan_vae: AutoencoderKLWan, image_vae: AutoencoderKL, tmp_path: Path) -> None:
    for vae, key in ((wan_vae, "decoder.conv_in.weight"), (image_vae, "decoder.conv_in.weight")):
        vae.save_pretrained(tmp_path)
        state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items() if name != key}
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=f"1 (tensors are )?missing.*{key}"):
            load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(ValueError, match="a AutoencoderTiny"):
        load_codec(tmp_path)
    for wrong in (tmp_path / "nowhere", tmp_path / "config.json"):
        with pytest.raises(ValueError, match=wrong.name):
            load_codec(wrong)


def original_names(stages: int = 4, blocks: int = 2) -> list[str]:
    """Tensor names of Wan2.2_VAE.pth, from the constructors of wan/modules/vae2_2.py."""
    resblock = ["residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight", "residual.6.bias"]
    attention = ["norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"]
    names = [f"{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("weight", "bias")]
    for half, stage_name, count, widening, timed in (
        ("encoder", "downsamples", blocks, (1, 2), (1, 2)),  # stages whose width changes; that resample time
        ("decoder", "upsamples", blocks + 1, (2, 3), (0, 1)),
    ):
        names += [f"{half}.conv1.{kind}" for kind in ("weight", "bias")]
        names += [f"{half}.head.0.gamma", f"{half}.head.2.weight", f"{half}.head.2.bias"]
        names += [f"{half}.middle.{i}.{name}" for i, part in enumerate((resblock, attention, resblock)) for name in part]
        for stage in range(stages):
            place = f"{half}.{stage_name}.{stage}.{stage_name}"
            names += [f"{place}.{i}.{name}" for i in range(count) for name in resblock]
            if stage in widening:
                names += [f"{place}.0.shortcut.{kind}" for kind in ("weight", "bias")]
            if stage < stages - 1:
                names += [f"{place}.{count}.resample.1.{kind}" for kind in ("weight", "bias")]
                if stage in timed:
                    names += [f"{place}.{count}.time_conv.{kind}" for kind in ("weight", "bias")]
    return names


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """A state dict in the original names, at reduced width."""
    config = wan.config_from(
        {
            "encoder.conv1.weight": torch.empty(8, 12, 3, 3, 3),
            "decoder.conv1.weight": torch.empty(4 * 12, 48, 3, 3, 3),
            "conv2.weight": torch.empty(48, 48, 1, 1, 1),
            "encoder.downsamples.0.downsamples.0.residual.2.weight": torch.empty(0),
        },
        "test",
    )
    state = AutoencoderKLWan(**config).state_dict()
    names = original_names()
    assert sorted(map(wan.rename, names)) == sorted(state), "every name of the one is a name of the other"
    return {name: torch.randn(state[wan.rename(name)].shape, generator=torch.Generator().manual_seed(7)) * 0.1 for name in names}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_original_file_loads_completely(original: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"Wan2.2_VAE{suffix}"
    if suffix == ".pth":
        torch.save(original, path)
    else:
        save_file(original, path)
    codec = load_codec(path, SCALE)
    loaded = codec.vae.state_dict()
    assert len(loaded) == len(original)
    assert all(torch.equal(loaded[wan.rename(name)], tensor) for name, tensor in original.items())
    assert codec.vae.config.latents_mean == list(wan.LATENTS_MEAN)
    assert codec.encode(clip(5)).shape == (2, 2, 48, 1, 2)
    codec.save(tmp_path / "vae")
    again = load_codec(tmp_path / "vae", SCALE)
    assert torch.equal(again.encode(clip(5)), codec.encode(clip(5)))


@torch.no_grad()
def test_published_widths() -> None:
    """At the published widths (encoder 160, decoder 256) the names are the same; built without memory."""
    probes = {
        "encoder.conv1.weight": torch.empty(160, 12, 3, 3, 3, device="meta"),
        "decoder.conv1.weight": torch.empty(1024, 48, 3, 3, 3, device="meta"),
        "conv2.weight": torch.empty(48, 48, 1, 1, 1, device="meta"),
        "encoder.downsamples.0.downsamples.0.residual.2.weight": torch.empty(0),
    }
    config = wan.config_from(probes, "test")
    assert (config["base_dim"], config["decoder_base_dim"]) == (160, 256)
    with torch.device("meta"):
        assert sorted(AutoencoderKLWan(**config).state_dict()) == sorted(map(wan.rename, original_names()))


def test_original_file_that_does_not_fit(original: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    broken = {name: tensor for name, tensor in original.items() if name != "decoder.head.0.gamma"}
    torch.save({**broken, "decoder.tail.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing \(decoder.norm_out.gamma\); 1 extra \(decoder.tail.weight\)"):
        load_codec(path)
    torch.save({"conv2.weight": torch.zeros(16, 16, 1, 1, 1)}, path)
    with pytest.raises(ValueError, match="not the original Wan"):
        load_codec(path)

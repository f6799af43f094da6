"""Pixels to latents and back, through diffusers' VAEs: Wan 2.2 for video, SD-VAE for images.

Legend: B clips, F frames, H × W pixels, f latent frames, h × w latent places, C latent channels.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelflow.adapters import wan
from reelflow.adapters.checkpoint import load_into, read_pickle, read_weights
from reelflow.adapters.wan_fast import WanPass, channels_last


class Codec(ABC):
    """A VAE as the flow sees it: uint8 frames in, standardised float32 latents out, and the exact inverse of the scaling.

    Computes in the precision and on the device of `vae`; nothing is kept between calls. Memory holds one latent frame's
    worth of activations at a time, however long the clip.

    Attributes:
        spatial_factor: pixels per latent place, in each direction.
        temporal_factor: frames per latent frame after the first one, which stands alone.
        channels: C.
        latent_scale: latent frames after the first are multiplied by this.
    """

    spatial_factor: int
    temporal_factor: int
    channels: int

    def __init__(self, vae: Any, latent_scale: float, mean_C: Tensor, std_C: Tensor, noise_scale: float):
        self.vae, self.latent_scale, self.noise_scale = vae.eval().requires_grad_(False), latent_scale, noise_scale
        self.mean_C11, self.std_C11 = mean_C.float().view(-1, 1, 1), std_C.float().view(-1, 1, 1)

    @abstractmethod
    def _encoder(self) -> Callable[[Tensor], Tensor]:
        """From pixels (B, 3, n, H, W) of the next latent frame to its moments (B, 2C, 1, h, w)."""

    @abstractmethod
    def _decoder(self) -> Callable[[Tensor], Tensor]:
        """From the next latent frame (B, C, 1, h, w) to its pixels (B, 3, n, H, W)."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(f, h, w) of a clip of `frames` × `height` × `width` pixels.

        Raises:
            ValueError: a size this codec cannot take; names it and the nearest ones it can.
        """
        for name, value, factor, first in (
            ("frames", frames, self.temporal_factor, 1),
            ("height", height, self.spatial_factor, self.spatial_factor),
            ("width", width, self.spatial_factor, self.spatial_factor),
        ):
            if value < first or (value - first) % factor:
                below = first + (max(value - first, 0) // factor) * factor
                nearest = f"{below} or {below + factor}" if value > first else f"{first}"
                rule = f"1 + {factor}k" if first == 1 else f"a multiple of {factor}"
                raise ValueError(f"{name} = {value}: must be {rule} for this model; nearest: {nearest}")
        return 1 + (frames - 1) // self.temporal_factor, height // self.spatial_factor, width // self.spatial_factor

    @torch.no_grad()
    def encode(self, frames_BFHW3: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of clips.

        Args:
            frames_BFHW3: uint8, on any device.
            generator: None gives the posterior's mean; else the posterior is sampled, latent frame after latent frame, on
                the generator's device (the same seed means the same noise for a clip and for its beginning).

        Returns:
            float32 (B, f, C, h, w) on the codec's device: (mean − latents mean) / latents std, plus, with a generator, the
            noise exp(logvar / 2)·ε; then the latent scale. For Wan the noise is *not* divided by the std: so the reference
            does it, and the flow was trained on it.

        Raises:
            ValueError: not uint8 frames, or a size the codec cannot take.
        """
        latents = []
        for index, (mean, std) in enumerate(self._moments(frames_BFHW3)):
            if generator is not None:
                noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
                mean = mean + std * noise
            latents.append(mean * (self.latent_scale if index else 1))
        return torch.stack(latents, 1)

    @torch.no_grad()
    def posterior(self, frames_BFHW3: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` samples from: standardised mean and standard deviation, float32 (B, f, C, h, w) each.

        Without the latent scale: `encode` gives mean + std · ε, and then the scale.
        """
        means, stds = zip(*self._moments(frames_BFHW3), strict=True)
        return torch.stack(means, 1), torch.stack(stds, 1)

    def _moments(self, frames_BFHW3: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised mean and standard deviation of one latent frame after the other."""
        if frames_BFHW3.dtype != torch.uint8 or frames_BFHW3.ndim != 5 or frames_BFHW3.shape[-1] != 3:
            raise ValueError(f"frames are {frames_BFHW3.dtype} {tuple(frames_BFHW3.shape)}; expected uint8 (B, F, H, W, 3)")
        encoder = self._encoder()
        for index in range(self.latent_shape(*frames_BFHW3.shape[1:4])[0]):
            start = 1 + (index - 1) * self.temporal_factor if index else 0
            end = 1 + index * self.temporal_factor
            pixels = frames_BFHW3[:, start:end].to(self.vae.device).permute(0, 4, 1, 2, 3)
            moments = encoder((pixels.float() / 127.5 - 1).to(self.vae.dtype))[:, :, 0].float()
            yield self.standardised(*moments.chunk(2, dim=1))

    def standardised(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, as `posterior` gives them, of the VAE's own mean and log-variance (…, C, h, w)."""
        mean = (mean - self.mean_C11.to(mean.device)) / self.std_C11.to(mean.device)
        return mean, self.noise_scale * torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode_frames(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode latent frames (B, C, h, w) as they come: yields uint8 (B, n, H, W, 3) on CPU, n = 1 and then `temporal_factor`.

        Raises:
            ValueError: latents of another shape.
        """
        for pixels in self.decode_pixels(latents):
            yield pixels.mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

    @torch.no_grad()
    def decode_pixels(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `decode_frames`, but float32 (B, 3, n, H, W) from 0 to 2, on the codec's device, not through 8 bits."""
        decoder = self._decoder()
        for index, latent in enumerate(latents):
            if latent.ndim != 4 or latent.shape[1] != self.channels:
                raise ValueError(f"a latent frame is {tuple(latent.shape)}; expected (B, {self.channels}, h, w)")
            latent = latent.to(self.vae.device).float() / (self.latent_scale if index else 1)
            latent = latent * self.std_C11.to(latent.device) + self.mean_C11.to(latent.device)
            yield decoder(latent[:, :, None].to(self.vae.dtype)).float().clamp_(-1, 1).add_(1)

    def decode(self, latents_BfChw: Tensor) -> Tensor:
        """uint8 frames (B, F, H, W, 3), on CPU, of latents (B, f, C, h, w); undoes the scaling of `encode` exactly."""
        if latents_BfChw.ndim != 5 or not latents_BfChw.shape[1]:
            raise ValueError(f"latents are {tuple(latents_BfChw.shape)}; expected (B, f, {self.channels}, h, w)")
        return torch.cat(list(self.decode_frames(latents_BfChw.unbind(1))), 1)

    def save(self, folder: str | Path) -> None:
        """Write as a diffusers folder."""
        self.vae.save_pretrained(str(folder))


class VideoCodec(Codec):
    """Wan's causal video VAE (`AutoencoderKLWan`): the first frame alone, then groups of `temporal_factor` frames."""

    def __init__(self, vae: Any, latent_scale: float = 1.0):
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        super().__init__(vae, latent_scale, mean, std, noise_scale=1.0)
        self.spatial_factor, self.temporal_factor = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
        self.channels = vae.config.z_dim
        if len(mean) != self.channels or len(std) != self.channels:
            raise ValueError(f"the VAE has {self.channels} channels, but {len(mean)} latents_mean and {len(std)} latents_std in its config")
        channels_last(vae)

    def _encoder(self) -> Callable[[Tensor], Tensor]:
        return WanPass(self.vae, stream=True).encode

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return WanPass(self.vae, stream=True).decode

    def save(self, folder: str | Path) -> None:
        for parameter in self.vae.parameters():
            parameter.data = parameter.data.contiguous()  # safetensors takes no other layout
        super().save(folder)
        channels_last(self.vae)


class ImageCodec(Codec):
    """SD-VAE (`AutoencoderKL`): every frame by itself; latents are the posterior times `scaling_factor` (0.18215)."""

    def __init__(self, vae: Any, latent_scale: float = 1.0):
        factor = vae.config.scaling_factor
        if vae.config.shift_factor or latent_scale != 1:
            raise ValueError(f"image VAE with shift_factor = {vae.config.shift_factor}, latent scale = {latent_scale}: not supported")
        self.channels = vae.config.latent_channels
        super().__init__(vae, 1.0, torch.zeros(self.channels), torch.full((self.channels,), 1 / factor), noise_scale=factor)
        self.spatial_factor, self.temporal_factor = 2 ** (len(vae.config.block_out_channels) - 1), 1

    def _encoder(self) -> Callable[[Tensor], Tensor]:
        return lambda pixels: self.vae.encode(pixels[:, :, 0]).latent_dist.parameters[:, :, None]

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return lambda latent: self.vae.decode(latent[:, :, 0]).sample[:, :, None]


def load_codec(
    source: str | Path, latent_scale: float = 1.0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Codec:
    """Load a VAE: a diffusers folder (`AutoencoderKLWan`, `AutoencoderKL`), or the original `Wan2.2_VAE` file, strictly.

    Args:
        latent_scale: of latent frames after the first (0.6 for STARFlow-V).

    Raises:
        ValueError: missing, unreadable, another kind of VAE, or tensors that do not fit.
    """
    source = Path(source)
    if source.is_file():
        state = read_weights(source) if source.suffix == ".safetensors" else read_pickle(source)
        config = wan.config_from(state, str(source))
        return VideoCodec(_wan_vae(config, {wan.rename(key): tensor for key, tensor in state.items()}, device, dtype), latent_scale)
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{source}: no VAE here; expected a diffusers folder (config.json, safetensors) or Wan2.2_VAE.pth") from None
    if kind == "AutoencoderKLWan":
        config.pop("clip_output", None)  # in the published config; the decoder clips to the pixel range anyway
        return VideoCodec(_wan_vae(config, read_weights(source, "diffusion_pytorch_model"), device, dtype), latent_scale)
    if kind == "AutoencoderKL":
        return ImageCodec(_image_vae(source, dtype).to(torch.device(device)), latent_scale)
    raise ValueError(f"{source}: a {kind}; the VAEs of flow models are AutoencoderKLWan (video) and AutoencoderKL (image)")


def _wan_vae(config: dict[str, Any], weights: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    load_into(vae, weights, device, dtype)
    return vae


def _image_vae(folder: Path, dtype: torch.dtype) -> Any:
    """Through diffusers' own loader, which renames the attention of older files such as sd-vae-ft-ema's."""
    from diffusers import AutoencoderKL

    try:
        vae, info = AutoencoderKL.from_pretrained(
            str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: the VAE cannot be loaded ({(str(error).splitlines() or [''])[0][:200]})") from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors are missing, extra or misshaped ({', '.join(wrong[:3])})")
    return vae

"""Stable Video Diffusion: picture → CLIP embedding and conditioning latent → noise → Euler steps → decoder → clip.

Shapes: B clips, F frames, H × W pixels, h × w latent places (H / 8, W / 8), E embedding channels, T steps; released models have 4
latent channels, smaller ones may have others, and larger places.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.lora import Lora, apply
from reelflow.adapters.svd import Parts, load_part, load_parts
from reelflow.clip import Clip
from reelflow.config import ModelConfig
from reelflow.media.aspect import ASPECTS, frame_size
from reelflow.pipelines.base import Device, Picture, Pipeline, Precision, Progress, check_length, new_seed, say, silent, spoken
from reelflow.pipelines.loading import Asked
from reelflow.pipelines.svd.attention import FeedForward, SelfAttention
from reelflow.pipelines.svd.blocks import Activation, Care, caring
from reelflow.pipelines.svd.budget import Plan, choose
from reelflow.pipelines.svd.decoder import Decoder, Encoder
from reelflow.pipelines.svd.memory import fitting
from reelflow.pipelines.svd.picture import UNIT, check_size, clip_view, factor, fitting_size, open_picture, own_size, pixels
from reelflow.pipelines.svd.sampling import denoise
from reelflow.pipelines.svd.settings import FPS, USUAL, Diffusion, ramp
from reelflow.pipelines.svd.unet import Denoiser

MOST_FRAMES = 4
"""Times the trained length: beyond it the frames' places in time mean nothing to the network."""


class SvdPipeline(Pipeline):
    """UNet, VAE and CLIP of one model."""

    options = frozenset("guidance first-guidance steps fps motion noise-aug playback size reference schedule guided reuse first".split())

    def __init__(self, parts: Parts):
        self.about: ModelConfig = parts.about
        self.scheduler, self.clip_norm = parts.scheduler, (parts.clip_mean, parts.clip_std)
        self.factor, self.channels = factor(parts.vae), parts.unet.config.out_channels
        self.own_size = own_size(parts.unet, self.factor)
        self.image_encoder, self.encoder = parts.image_encoder, Encoder(parts.vae)
        self.denoiser, self.decoder = Denoiser(parts.unet).eval(), Decoder(parts.vae).eval()
        self.loras: list[dict[str, Any]] = []
        self._adapters: list[tuple[Lora, float]] = []
        self._source: Path | None = None
        self.device, self.plan = self.denoiser.device, cast("Plan[Self] | None", None)

    @classmethod
    def load(
        cls, source: Path, device: Device, precision: Precision = "auto", budget: int | None = None, asked: Asked | None = None
    ) -> Self:
        """Load a diffusers folder or an original single file.

        Args:
            precision: float32 or bfloat16; "auto": float32, and within a budget bfloat16 where that does not fit.
            budget: bytes of the device; the quickest way of running the model that keeps within them is taken, and said.
            asked: the clip that the budget is for; by default one of the trained length and size.

        Raises:
            ValueError: as `adapters.svd.load_parts`; a precision that this family does not come in; nothing fits the budget.
        """
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"{source}: models of this family come in float32 and bfloat16, not in {precision}")
        if budget is None:
            pipe = cls(load_parts(source, device, getattr(torch, "float32" if precision == "auto" else precision)))
        else:
            names = ["float32", "bfloat16"] if precision == "auto" else [str(precision)]
            plan = choose(lambda name: cls(load_parts(source, "cpu", getattr(torch, name))), names, torch.device(device), budget, asked)
            pipe = plan.account.pipe
            pipe.plan, pipe.device = plan, torch.device(device)
            plan.settle(pipe)
            say(str(plan))
        pipe._source = source
        return pipe

    def load_lora(self, file: str | Path, weight: float = 1.0) -> None:
        """Add what a LoRA of the UNet learned, times `weight`. The UNet is read from disk again: the network that samples shares
        it in another arrangement.

        Raises:
            ValueError: not a LoRA, of another architecture, or a model that did not come from disk.
        """
        if self._source is None:
            raise ValueError(f"{self.about.name}: a LoRA needs a model that was loaded from disk; use reelflow.load")
        adapters = [*self._adapters, (Lora.open(file), weight)]
        kind, folder = (self.denoiser.device, self.denoiser.dtype), self._source / "unet"
        unet = load_part(folder, "unet", *kind) if folder.is_dir() else load_parts(self._source, *kind).unet
        for adapter, share in adapters:
            apply(adapter, dict(unet.named_parameters()), self.about, share)
        compiled = self.denoiser.recorded
        self.denoiser, self._adapters = Denoiser(unet).eval(), adapters
        if compiled:
            self.compile()
        self.loras.append({"file": Path(file).name, "weight": weight})

    def compile(self) -> None:
        """For many clips of one shape: what lies around the products as single kernels, region by region (torch.compile), and on a GPU
        each step as one CUDA graph. The first clip takes minutes longer; clips stay the same up to rounding.

        Raises:
            ValueError: the model was loaded with a memory budget, which does not count what graphs and kernels keep.
        """
        if self.plan:
            raise ValueError(f"{self.about.name}: compile does not go with a memory budget; load the model without one")
        torch._dynamo.config.recompile_limit = 256  # of one region: as many shapes as the networks have
        for module in (*self.denoiser.modules(), *self.decoder.modules()):
            if isinstance(module, Activation | FeedForward | SelfAttention):
                module.compile(dynamic=False)
        self.denoiser.recorded = True

    def animate(
        self, image: Picture, prompt: str = "", *, seed: int | None = None, seconds: float | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None, sampling: Diffusion = USUAL, progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Picture → video that begins with it.

        Args:
            image: as in every family, or floating-point values 0 … 1, (H, W, 3); its largest centred part is used.
            prompt: kept in the metadata; this family reads no text.
            seed: 0 … 2^63 − 1; random if absent, always in the metadata.
            seconds, frames: length, 1 … four times the trained one, which is the default.
            size: (width, height), multiples of 64; by default the model's own (1024 × 576), upright for upright pictures.

        Raises:
            ValueError: a picture or setting that is not usable, with what would be; non-finite values; out of memory.
        """
        self.require("animate")
        if prompt.strip():
            say(f"{self.about.name} reads no text: the prompt changes nothing")
        return self.animate_batch([image], [new_seed(seed)], prompt, seconds, frames, size, sampling, progress)[0]

    def animate_batch(
        self, images: Sequence[Picture], seeds: Sequence[int], prompt: str = "", seconds: float | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None, sampling: Diffusion = USUAL, progress: Progress = silent,
    ) -> list[Clip]:  # fmt: skip
        """Several pictures at once, each with its seed, in the size of the first; a clip does not depend on the others."""
        sampling = self._settled(sampling)
        length = self._length(seconds, frames, sampling)
        opened = [open_picture(image) for image in images]
        height, width = check_size(size) if size else fitting_size(opened[0], self.own_size)
        shown = torch.stack([pixels(found, height, width) for found in opened])
        made, took = self._sample(shown, list(seeds), length, sampling, progress)
        return [self._clip(_uint8(each), "animate", prompt, seed, sampling, took) for each, seed in zip(made, seeds, strict=True)]

    def generate(
        self, prompt: str, *, seed: int | None = None, seconds: float | None = None, frames: int | None = None, aspect: str | None = None,
        size: tuple[int, int] | None = None, first: str = "mini", sampling: Diffusion = USUAL, progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Text → picture → video: another model paints the first frame, which this one sets in motion.

        Args:
            aspect: one of `media.aspect.ASPECTS`, by default the model's own.
            first: the model of the first frame: a STARFlow, or a diffusers text-to-image pipeline (folder or Hugging Face id).
        """
        from reelflow.pipelines.svd.first_frame import paint

        self.require("generate")
        spoken(prompt, "generate")
        seed, sampling = new_seed(seed), self._settled(sampling)
        length = self._length(seconds, frames, sampling)
        height, width = check_size(size) if size else self.frame_size(aspect)
        painted = paint(first, prompt, seed, height, width, self.device, progress)
        made, took = self._sample(pixels(painted, height, width)[None], [seed], length, sampling, progress)
        return self._clip(_uint8(made[0]), "generate", prompt, seed, sampling, took, first=first)

    def extend(
        self, clip: Clip, prompt: str = "", *, seconds: float, seed: int | None = None, size: tuple[int, int] | None = None,
        sampling: Diffusion = USUAL, progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Continue a video to `seconds` in all: its last frame is animated, the last frame of that again, and so on.

        One frame overlaps at every seam. Its own frames are kept as they are, cut to the size of the clip. The motion begins
        anew at a seam, and colours and sharpness drift from one to the next, which is said.
        """
        self.require("extend")
        if sampling.playback not in (None, clip.fps):
            raise ValueError(f"playback {sampling.playback:g}: a continued video keeps its own rate, {clip.fps:g}; leave it out")
        seed, sampling = new_seed(seed), self._settled(sampling, clip.fps)
        check_length(seconds, None)
        wanted = round(seconds * clip.fps)
        if wanted <= len(clip):
            raise ValueError(f"the video is {clip.seconds:.2f} s long already; give more than that for --seconds")
        height, width = check_size(size) if size else fitting_size(open_picture(clip[:1]), self.own_size)
        source = clip.resized(height, width)
        length, parts, took = self.about.frames, [source.frames], dict[str, float]()
        hops = -(-(wanted - len(clip)) // (length - 1))
        say(f"{hops} clips are joined; each begins from one frame, so motion restarts and quality drifts from seam to seam")
        last = pixels(source[-1:], height, width)
        for hop in range(hops):
            here: Progress = lambda phase, share, hop=hop: progress(phase, (hop + share) / hops)  # type: ignore[misc] # noqa: E731
            made, spent = self._sample(last[None], [seed + hop], length, sampling, here)
            took = {phase: round(took.get(phase, 0) + seconds, 3) for phase, seconds in spent.items()}
            parts.append(_uint8(made[0, 1:]))
            last = made[0, -1].clamp(-1, 1).cpu()  # as it is, not through 8 bits
        frames = np.concatenate(parts)[:wanted]
        return self._clip(frames, "extend", prompt, seed, sampling, took, source_frames=len(clip))

    def stream(self, *args: Any, **options: Any) -> Any:
        raise ValueError(f"{self.about.name} (svd) makes all frames together and cannot stream them; use generate or a STARFlow-V model")

    def frame_size(self, aspect: str | None) -> tuple[int, int]:
        """(height, width) of an aspect at the model's area."""
        if aspect is None:
            return self.own_size
        if aspect not in ASPECTS:
            raise ValueError(f"aspect {aspect!r} is not one of {', '.join(ASPECTS)}")
        height, width = frame_size(self.about.size, aspect, UNIT)
        return max(UNIT, height), max(UNIT, width)

    def _settled(self, sampling: Diffusion, given_fps: float | None = None) -> Diffusion:
        """Every setting with its value: rates by default the model's, or a given video's."""
        fps = sampling.fps or (min(FPS[1], max(FPS[0], round(given_fps))) if given_fps else round(self.about.fps))
        guidance = self.about.guidance if sampling.guidance is None else sampling.guidance
        return replace(sampling, fps=fps, guidance=guidance, playback=given_fps or sampling.playback or float(fps))

    def _length(self, seconds: float | None, frames: int | None, sampling: Diffusion) -> int:
        check_length(seconds, frames)
        assert sampling.playback is not None
        length = frames or (max(1, round(seconds * sampling.playback)) if seconds else self.about.frames)
        most = MOST_FRAMES * self.about.frames
        if length > most:
            raise ValueError(f"{length} frames are more than {self.about.name} makes at once ({most}); make fewer, and extend the clip")
        if length > self.about.frames:
            say(f"{length} frames, {self.about.name} was trained on {self.about.frames}: the end may freeze or lose its shape")
        return length

    @torch.no_grad()
    def _sample(
        self, shown_B3HW: Tensor, seeds: list[int], frames: int, sampling: Diffusion, progress: Progress
    ) -> tuple[Tensor, dict[str, float]]:
        """Pictures −1 … 1 → frames (B, F, 3, H, W), about −1 … 1; and the seconds of each phase."""
        clock = _Clock()
        shown_B3HW, (height, width) = shown_B3HW.to(self.device), shown_B3HW.shape[2:]
        use = self.plan.use if self.plan else (lambda *parts: nullcontext())
        with fitting(self, len(seeds), frames, height, width), caring(self.plan.care if self.plan else Care()):
            if self.plan:
                self.plan.check(frames, height, width, bool((ramp(sampling, self.about.guidance, frames) != 1).any()), len(seeds))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise_B3HW = torch.stack([torch.randn(3, height, width, generator=each) for each in generators])
            shape = frames, self.channels, height // self.factor, width // self.factor
            noise_BF4hw = torch.stack([torch.randn(shape, generator=each) for each in generators])
            progress("encoding", 0.0)
            with use("image_encoder"):
                weight = self.image_encoder.visual_projection.weight
                states_BE = self.image_encoder(clip_view(shown_B3HW, *self.clip_norm).to(weight.dtype)).image_embeds
            progress("encoding", 0.5)
            with use("encoder"):
                picture_B4hw = self.encoder(shown_B3HW + sampling.noise_aug * noise_B3HW.to(self.device))
            self._require_finite("encoding", states_BE, picture_B4hw)
            clock.lap("encoding")
            with use("denoiser"):
                latents_BF4hw = self._denoise(noise_BF4hw.to(self.device), picture_B4hw, states_BE, sampling, progress)
            self._require_finite("sampling", latents_BF4hw)
            clock.lap("sampling")
            with use("decoder"):
                made = self.decoder(latents_BF4hw, lambda share: progress("decoding", share))
            self._require_finite("decoding", made)
            clock.lap("decoding")
        return made, clock.laps

    def _denoise(self, noise_BF4hw: Tensor, picture_B4hw: Tensor, states_BE: Tensor, sampling: Diffusion, progress: Progress) -> Tensor:
        how = replace(sampling, guidance=self.about.guidance) if sampling.guidance is None else sampling
        return denoise(self.denoiser, self.scheduler, noise_BF4hw, picture_B4hw, states_BE, how, progress)

    def _require_finite(self, phase: str, *values: Tensor) -> None:
        if not all(bool(torch.isfinite(each).all()) for each in values):
            raise ValueError(f"{phase} gave values that are not finite; use --precision float32, or fetch {self.about.name} again")

    def _clip(
        self, frames: np.ndarray, task: str, prompt: str, seed: int, sampling: Diffusion, took: dict[str, float], **more: Any
    ) -> Clip:
        assert sampling.playback is not None
        settings = {"frames": len(frames), **more, **asdict(sampling), **({"lora": self.loras} if self.loras else {})}
        memory = {"memory": self.plan.about()} if self.plan else {}
        return Clip(frames, sampling.playback, self.made(task, prompt, seed, **settings) | {"seconds": took} | memory)


def _uint8(frames_F3HW: Tensor) -> np.ndarray:
    """(F, H, W, 3)."""
    return (frames_F3HW / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class _Clock:
    """Seconds of each phase; its values were just looked at, so the device is done with it."""

    def __init__(self) -> None:
        self.laps, self.last = dict[str, float](), time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[phase], self.last = round(now - self.last, 3), now


__all__ = ["Diffusion", "SvdPipeline"]

"""STARFlow and STARFlow-V: prompt → noise → deep block → shallow blocks → denoiser → decoder → clip.

Shapes: B clips, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.precision import QUANTISED
from reelflow.adapters.text import TextEncoder
from reelflow.adapters.vae import Codec
from reelflow.clip import Clip
from reelflow.config import ModelConfig
from reelflow.denoise import denoise, denoise_frames
from reelflow.flow import StarFlow
from reelflow.likelihood import LogProb, add_noise, log_prob
from reelflow.pipelines.base import (
    Device,
    Encoding,
    Picture,
    Pipeline,
    Precision,
    Progress,
    Score,
    check_length,
    new_seed,
    picture,
    say,
    silent,
    spoken,
    tokens_to_share,
)
from reelflow.pipelines.framing import Framing
from reelflow.pipelines.prompting import Prompting
from reelflow.pipelines.settings import EXACTLY, Sampling
from reelflow.sampling import Settings, certify, default_context, sample, stream

if TYPE_CHECKING:
    from reelflow.pipelines.budget import Plan
    from reelflow.pipelines.loading import Asked


class StarFlowPipeline(Pipeline):
    """A flow with its video codec and text encoder."""

    shares = True

    def __init__(
        self, about: ModelConfig, flow: StarFlow, codec: Codec, text: TextEncoder | None, device: torch.device | None = None,
        precision: str | None = None, plan: Plan | None = None,
    ):  # fmt: skip
        """plan: how it keeps within a memory budget. Where and in what the flow runs is, by default, as it is."""
        self.about, self.flow, self.codec, self.text, self.plan = about, flow.eval().requires_grad_(False), codec, text, plan
        self.device = device or flow.deep_block.proj_in.weight.device
        self.precision = precision or str(flow.deep_block.precision).removeprefix("torch.")
        self.use = plan.places(self.device, flow, codec, text) if plan else (lambda *parts: nullcontext())
        self.framing = Framing(about, codec)
        self.prompting = Prompting(about, flow.config, text, self.device, self.use)
        self.loras: list[dict[str, Any]] = []

    def load_lora(self, file: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA's change, times `weight`, to the weights of the flow; several add up. Raises ValueError where it does not fit."""
        from reelflow.adapters.lora import Lora, apply

        shared = self.flow.ranks.tensor > 1
        if shared or self.precision in QUANTISED or (self.plan and self.plan.way.layers == "host"):
            why = "shared among processes" if shared else f"in {self.precision}, or in the host's memory"
            raise ValueError(f"the layers are {why}; add the LoRA before: reelflow models merge MODEL LORA -o FOLDER")
        apply(Lora.open(file), dict(self.flow.named_parameters()), self.about, weight)
        self.loras.append({"file": Path(file).name, "weight": weight})

    def made(self, task: str, prompt: str, seed: int | None, **settings: Any) -> dict[str, Any]:
        made = super().made(task, prompt, seed, precision=self.precision, **settings, **({"lora": self.loras} if self.loras else {}))
        return made | ({"memory": self.plan.about()} if self.plan else {})

    def _check(self, latents_BFChw: Tensor, guidance: float = 0.0, sampling: Sampling = Sampling(), **wish: Any) -> None:
        """Raise ValueError where a clip of these latents does not fit the memory budget; `wish`: see `trial.Wish`."""
        if self.plan:
            wish |= {name: getattr(sampling, name) for name in ("ring", "denoise", "certify")}
            self.plan.check(tuple(latents_BFChw.shape), guidance, **wish)

    def generate(
        self, prompt: str, *, seed: int | None = None, seconds: float | None = None, frames: int | None = None, aspect: str = "1:1",
        sampling: Sampling = Sampling(), progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Text → video.

        Args:
            prompt: what to show; not empty.
            seed: 0 … 2^63 − 1; random if absent, always in the metadata.
            seconds, frames: length; frames must be one the codec takes (1 + 4k). By default the trained length.
            aspect: width:height, one of `framing.ASPECTS` (models of one aspect: 1:1).

        Raises:
            ValueError: an empty prompt or a setting that is not usable, with what would be.

        Example:
            >>> import reelflow
            >>> clip = reelflow.load("mini").generate("a red ball moves right", seed=0, frames=5)
            >>> clip.frames.shape
            (5, 128, 128, 3)
        """
        self.require("generate")
        return self.generate_batch([prompt], [new_seed(seed)], seconds, frames, aspect, sampling, progress)[0]

    def generate_batch(
        self, prompts: list[str], seeds: list[int], seconds: float | None = None, frames: int | None = None, aspect: str = "1:1",
        sampling: Sampling = Sampling(), progress: Progress = silent,
    ) -> list[Clip]:  # fmt: skip
        """Several prompts at once, each with its seed; a clip does not depend on the others of its batch."""
        for prompt in prompts:
            spoken(prompt, "generate")
        length = self.framing.length(seconds, frames)
        seeds = [self._agree(seed, (prompts, length, aspect, sampling)) for seed in seeds]
        shape = self.codec.latent_shape(length, *self.framing.frame_size(aspect))
        noise = torch.stack([self._noise(seed, shape) for seed in seeds])
        latents, used = self._sample(prompts, noise, None, sampling, progress, aspect=aspect)
        pixels = self._decode(latents, progress)
        return [self._clip(pixels[i], "generate", prompts[i], seeds[i], used, frames=length, aspect=aspect) for i in range(len(prompts))]

    def animate(
        self, image: Picture, prompt: str = "", *, seed: int | None = None, seconds: float | None = None, frames: int | None = None,
        sampling: Sampling = Sampling(), progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Picture (and text) → video that begins with it. The picture is centre-cropped to the nearest aspect of the model."""
        self.require("animate")
        length = self.framing.length(seconds, frames)
        seed = self._agree(new_seed(seed), (prompt, length, sampling))
        first, aspect = self.framing.fit(picture(image))
        shape = self.codec.latent_shape(length, first.height, first.width)
        given = self._latents(first)
        latents, used = self._sample([prompt], self._noise(seed, shape)[None], given, sampling, progress, seed=seed, aspect=aspect)
        return self._clip(self._decode(latents, progress)[0], "animate", prompt, seed, used, frames=length)

    def edit(
        self, clip: Clip, prompt: str, *, seed: int | None = None, sampling: Sampling = Sampling(),
        progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Video and instruction → video of the same length (at most the trained one; the rest is left out, and said so)."""
        self.require("edit")
        spoken(prompt, "edit")
        source, aspect = self.framing.source(clip, self.about.frames)
        seed = self._agree(new_seed(seed), (prompt, len(source), sampling))
        given = self._latents(self.framing.whole(source))
        shape = self.codec.latent_shape(len(source), source.height, source.width)
        noise = torch.cat((torch.zeros_like(given[0]).cpu(), self._noise(seed, shape)))[None]
        both, used = self._sample(
            [prompt], noise, given, sampling, progress, seed=seed, aspect=aspect, task="(v2v) ", window=2 * given.shape[1]
        )
        pixels = self._decode(both[:, given.shape[1] :], progress)
        return self._clip(pixels[0], "edit", prompt, seed, used, frames=len(source))

    def extend(
        self, clip: Clip, prompt: str = "", *, seconds: float, seed: int | None = None, sampling: Sampling = Sampling(),
        progress: Progress = silent,
    ) -> Clip:  # fmt: skip
        """Continue a video to `seconds` in all. Its own frames are kept as they are (cropped and resampled to the model's
        size and rate); the model reads as many of the last ones as its context holds.
        """
        self.require("extend")
        step = self.codec.temporal_factor
        source, aspect = self.framing.source(clip, None)
        seed = self._agree(new_seed(seed), (prompt, len(source), seconds, sampling))
        check_length(seconds, None)
        wanted = round(seconds * self.about.fps)
        if wanted <= len(source):
            raise ValueError(f"the video is {source.seconds:.2f} s long already; give more than that for --seconds")
        context = sampling.context or default_context(self.flow.config.window)
        read = 1 + step * min(context - 1, (len(source) - 1) // step)
        given = self._latents(source[len(source) - read :])
        shape = (given.shape[1] + ceil((wanted - len(source)) / step), *given.shape[3:])
        latents, used = self._sample([prompt], self._noise(seed, shape)[None], given, sampling, progress, seed=seed, aspect=aspect)
        new = self._decode(latents, progress)[0, read:]
        pixels = np.concatenate((source.frames, new))
        return self._clip(pixels, "extend", prompt, seed, used, frames=len(pixels), source_frames=len(source))

    def score(
        self, clip: Clip, prompt: str = "", *, seed: int = 0, progress: Progress = silent,
    ) -> Score:  # fmt: skip
        """Exact log-likelihood of a clip given a prompt (empty: the unconditional one). See `Score` for the density.

        Beyond the trained length the density is that of the windowed model: every window reads its context again.
        """
        source, aspect = self.framing.source(clip, None)
        x = add_noise(self._latents(source).cpu(), self.flow.config.noise_std, torch.Generator().manual_seed(new_seed(seed)))
        window, frames = self.flow.config.window, x.shape[1]
        self._check(x[:, :window], read=True)
        _, texts = self.prompting.parts([(0, [prompt])], 0.0, aspect, frames)
        context, parts, start, skip = default_context(window), [], 0, 0
        with torch.no_grad(), self.use("flow"):
            while start + skip < frames:
                found = log_prob(self.flow, x[:, start : start + window].to(self.device), texts[-1 if start else 0][1])
                parts.append(found.map[:, skip:].cpu())
                start, skip = start + window - context, context
                progress("scoring", min(1.0, (start + skip) / frames))
        total = LogProb(torch.cat(parts, 1), x.shape[2])
        return Score(
            log_prob=float(total.total), bits_per_dim=float(total.bits_per_dim), per_frame=total.per_frame[0].tolist(),
            map=total.map[0].numpy(), noise_std=self.flow.config.noise_std, seed=seed, dims=x.numel(), clip=source,
        )  # fmt: skip

    def encode(self, clip: Clip, prompt: str = "", *, seed: int = 0, progress: Progress = silent) -> Encoding:
        """Video → noise: the exact inverse of decoding, with data noise from `seed` so that z is standard normal where the
        model fits. At most the trained length.
        """
        source, aspect = self.framing.source(clip, self.about.frames)
        x = add_noise(self._latents(source).cpu(), self.flow.config.noise_std, torch.Generator().manual_seed(new_seed(seed)))
        self._check(x, read=True)
        states = self.prompting.states([prompt], aspect, image=len(source) == 1)
        with torch.no_grad(), self.use("flow"):
            z = self.flow(x.to(self.device), states).z
        progress("encoding", 1.0)
        return Encoding(z[0].cpu(), prompt, source.fps, seed, self.about.name, self.about.revision)

    def decode(self, encoding: Encoding, *, sampling: Sampling = EXACTLY, progress: Progress = silent) -> Clip:
        """Noise → video. The encoding's own data noise is taken away again, or, if it has none, denoised."""
        z = encoding.z
        if (encoding.model, encoding.revision) != (self.about.name, self.about.revision):
            made, own = f"{encoding.model} revision {encoding.revision}", f"{self.about.name} revision {self.about.revision}"
            raise ValueError(f"encoded with {made}, this is {own}; decode with the model it was made with")
        if z.ndim != 4 or z.shape[1] != self.flow.config.channels or not torch.isfinite(z).all():
            raise ValueError(f"z is {tuple(z.shape)}: expected finite (latent frames, {self.flow.config.channels}, h, w)")
        used = replace(sampling, guidance=0.0, temperature=1.0, denoise=encoding.seed is None)
        latents, report = self._sample([encoding.prompt], z[None], None, used, progress, aspect=self.framing.nearest_aspect(*z.shape[2:]))
        if encoding.seed is not None:
            noise = torch.Generator().manual_seed(encoding.seed)
            latents = add_noise(latents.cpu(), -self.flow.config.noise_std, noise)
        return self._clip(self._decode(latents, progress)[0], "decode", encoding.prompt, encoding.seed, report)

    def stream(
        self, prompt: str = "", *, prompts: Sequence[tuple[float, str]] | None = None, seed: int | None = None,
        seconds: float | None = None, frames: int | None = None, aspect: str = "1:1", sampling: Sampling = Sampling(),
        progress: Progress = silent,
    ) -> Iterator[Clip]:  # fmt: skip
        """The clip of `generate` in pieces, each as soon as it is finished: of 1 frame, then of one latent frame each.

        Args:
            prompts: instead of one prompt, (second, prompt) from 0 on: what is shown from then on. The video goes on from
                its last frames. Rounded up to whole latent frames.

        The metadata of every piece says how many seconds the first one took. Whoever stops early just stops.

        Raises:
            ValueError: also for a model that cannot stream, with the reason.
        """
        self.require("generate")
        began, length = time.perf_counter(), self.framing.length(seconds, frames)
        said = [(0.0, prompt)] if prompts is None else list(prompts)
        if not said or said[0][0] != 0 or [at for at, _ in said] != sorted({at for at, _ in said}):
            raise ValueError(f"prompts at {[at for at, _ in said]} seconds: the first has to be at 0, each later than the one before")
        seed = self._agree(new_seed(seed), (said, length, aspect, sampling))
        noise = self._noise(seed, self.codec.latent_shape(length, *self.framing.frame_size(aspect)))[None]
        guidance = self.prompting.guidance(sampling.guidance)
        self._check(noise, guidance, sampling, stream=True)
        parts = [(self._latent_frame(at), [spoken(text, "generate")]) for at, text in said]
        conditional, both = self.prompting.parts(parts, guidance, aspect, noise.shape[1])
        found = stream(
            self.flow, self._tempered(noise, sampling), both, guidance, context=sampling.context, ring=sampling.ring,
            schedule=sampling.schedule, progress=tokens_to_share(progress, noise[0, :, 0].numel() * len(self.flow.config.layers)),
        )  # fmt: skip
        if sampling.denoise:
            found = denoise_frames(self.flow, found, lambda frame: [text for first, text in conditional if first <= frame][-1])
        words = " → ".join(text for _, text in said)
        made = self.made("generate", words, seed, frames=length, aspect=aspect, **self._settings(sampling, guidance))
        first = 0.0
        with self.use("flow", "denoiser", "codec"):
            for pixels in self.codec.decode_frames(found):
                first = first or round(time.perf_counter() - began, 3)
                yield Clip(pixels[0].numpy(), self.about.fps, made | {"seconds": {"first_frame": first}})

    def _settings(self, sampling: Sampling, guidance: float) -> dict[str, Any]:
        """For the metadata: what was used, where the default stands for it."""
        used = replace(sampling.schedule, tolerance=sampling.schedule.accuracy(self.flow.deep_block.precision))
        own = {"guidance": guidance, "temperature": self._temperature(sampling)}
        chosen = {**own, "denoise": sampling.denoise, "ring": sampling.ring, **asdict(used)}
        return {name: value for name, value in chosen.items() if value is not None}

    def _temperature(self, sampling: Sampling) -> float:
        return self.about.temperature if sampling.temperature is None else sampling.temperature

    def _tempered(self, noise: Tensor, sampling: Sampling) -> Tensor:
        """On the device, with that standard deviation."""
        return noise.to(self.device) * self._temperature(sampling)

    def _agree(self, seed: int, request: tuple[Any, ...]) -> int:
        """The seed of the first process, where several make a clip together (see `flow.parallel`)."""
        if self.flow.ranks.branches > 1 and self.prompting.guidance(request[-1].guidance) == 0:
            say("without guidance one half of the processes only repeats what the other does")
        return self.flow.ranks.agree(seed, request)

    def _latent_frame(self, seconds: float) -> int:
        """The first latent frame that begins at that time or later."""
        frame = round(seconds * self.about.fps)
        return 0 if frame <= 0 else 1 + ceil((frame - 1) / self.codec.temporal_factor)

    def _latents(self, clip: Clip) -> Tensor:
        """(1, F, C, h, w): the posterior's mean, standardised and scaled, without noise."""
        with self.use("codec"):
            return self.codec.encode(torch.from_numpy(np.array(clip.frames))[None])

    def _noise(self, seed: int, shape: tuple[int, int, int]) -> Tensor:
        """(F, C, h, w) from a CPU generator, frame by frame: a longer clip begins with the shorter one's noise."""
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = shape
        return torch.stack([torch.randn(self.flow.config.channels, height, width, generator=generator) for _ in range(frames)])

    def _sample(
        self, prompts: list[str], noise_BFChw: Tensor, given_1FChw: Tensor | None, sampling: Sampling, progress: Progress, *,
        seed: int = 0, aspect: str = "1:1", task: str = "", window: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Noise → clean latents. Given first frames come back unchanged. Also returns the settings and reports used."""
        began = time.perf_counter()
        config, frames = self.flow.config, noise_BFChw.shape[1]
        guidance, given = self.prompting.guidance(sampling.guidance), 0 if given_1FChw is None else given_1FChw.shape[1]
        self._check(noise_BFChw, guidance, sampling, given=given, window=window)
        window = window or config.window
        conditional, both = self.prompting.parts([(0, [task + prompt for prompt in prompts])], guidance, aspect, frames, window)
        prefix = None
        if given_1FChw is not None:
            prefix = add_noise(given_1FChw.cpu(), config.noise_std, torch.Generator().manual_seed(seed + 1)).to(self.device)
        noise = self._tempered(noise_BFChw, sampling)
        settings = Settings(window=window, context=sampling.context, ring=sampling.ring, schedule=sampling.schedule)
        settings["progress"] = tokens_to_share(progress, noise[:, given:, 0].numel() * len(config.layers))
        with self.use("flow"):
            latents, reports = sample(self.flow, noise, both, guidance, prefix, **settings)
        used: dict[str, Any] = {
            "settings": self._settings(sampling, guidance),
            "reports": {name: asdict(report) for name, report in reports.items()},
        }
        sampled = time.perf_counter()
        if sampling.certify:
            progress("certifying", 0.0)
            with self.use("flow"):
                used["certificate"] = certify(self.flow, latents, noise, both, guidance, given, **settings)._asdict()
        if sampling.denoise:
            progress("denoising", 0.0)
            with self.use("denoiser" if config.denoiser else "flow"):
                latents = denoise(self.flow, latents, conditional[0][1], window)
        if given_1FChw is not None:
            latents = torch.cat((given_1FChw.to(latents), latents[:, given:]), 1)
        used["seconds"] = {"sampling": round(sampled - began, 3), "denoising": round(time.perf_counter() - sampled, 3)}
        return latents, used

    def _decode(self, latents_BFChw: Tensor, progress: Progress) -> np.ndarray:
        """uint8 (B, frames, H, W, 3)."""
        parts = []
        with self.use("codec"):
            for index, pixels in enumerate(self.codec.decode_frames(latents_BFChw.unbind(1))):
                parts.append(pixels)
                progress("decoding", (index + 1) / latents_BFChw.shape[1])
        return torch.cat(parts, 1).numpy()

    def _clip(self, pixels: np.ndarray, task: str, prompt: str, seed: int | None, used: dict[str, Any], **settings: Any) -> Clip:
        made = self.made(task, prompt, seed, **settings, **used["settings"])
        return Clip(pixels, self.about.fps, made | {name: found for name, found in used.items() if name != "settings"})

    @classmethod
    def load(
        cls, source: Path, device: Device, precision: Precision = "auto", budget: int | None = None, asked: Asked | None = None
    ) -> Self:
        """Load a model folder, or a reference checkpoint file as it is; see `loading.load_parts`."""
        from reelflow.pipelines.loading import Asked, load_parts

        return cls(**load_parts(source, device, precision, budget, asked or Asked()))


__all__ = ["Sampling", "StarFlowPipeline"]

"""A training run of Stable Video Diffusion: the paper's image-to-video recipe, every key documented."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from reelflow.config import ModelConfig
from reelflow.training.config import AnyBucket, AnyStage, LoraConfig, RunConfig, merge

SPEEDS = (3.0, 30.0)


class SvdBucket(AnyBucket):
    """Batches of one length."""

    task: Literal["animate"] = "animate"
    frames: int = Field(14, ge=2)
    """Frames of a clip."""


class SvdStage(AnyStage):
    buckets: tuple[SvdBucket, ...] = Field(min_length=1)


class SvdLora(LoraConfig):
    targets: tuple[str, ...] = Field(("*.attn1.to_*",), min_length=1)
    """Linear layers of the UNet by name, `*` for any part of it; default: self-attention, in space and time.
    `*.temporal_transformer_blocks.*.attn1.to_*`: in time alone, as published camera motions were trained."""


class SvdConfig(RunConfig):
    """`reelflow train CONFIG.yaml` with `about.family: svd`."""

    init: str | None = None
    """Model to start from: a packaged name, a folder of diffusers or of a run, a Hugging Face id. All its parts are its own; of
    `about` single keys may be given."""
    unet: dict[str, Any] = Field(default_factory=dict)
    """Of a new UNet: settings of diffusers' UNetSpatioTemporalConditionModel."""
    image_encoder: dict[str, Any] | Path = Field(default_factory=dict)
    """The CLIP tower of a new model: folder of a trained one (`python -m reelflow.training.svd.tower`), or settings of transformers'
    CLIPVisionConfig for one that is random and stays so."""
    lora: SvdLora | None = None
    stages: tuple[SvdStage, ...] = Field(min_length=1)
    rates: tuple[float, float] = SPEEDS
    """Lowest and highest playback rate, frames per second, that clips are shown at; told as fps − 1."""
    starts: int = Field(4, ge=1)
    """Every so many frames of a prepared clip one can be the picture that is animated."""
    p_mean: float = 1.0
    p_std: float = Field(1.6, gt=0)
    """Of ln σ, the noise level of the clip."""
    sigma_max: float | None = Field(None, gt=0.002, allow_inf_nan=False)
    """The σ that sampling begins at; None: as in init, 700 in a new model. Few clips are noised above exp(p_mean + 2 p_std) in training."""
    noise_mean: float = -3.0
    noise_std: float = Field(0.5, gt=0)
    """Of the logarithm of the noise level of the picture."""
    drop: float = Field(0.1, ge=0, le=0.33)
    """Share of clips without CLIP's embedding, as many without the picture's latents, as many without either."""
    sample_pictures: tuple[Path, ...] = ()
    """What sample clips begin with."""
    lr: float = Field(3e-5, gt=0)
    ema: float = Field(0.9999, ge=0, lt=1)

    def wrong(self) -> Iterator[str]:
        if self.latents is None and self.data is None:
            yield "nothing to train on; say under data where the clips are, or give latents that were prepared"
        yield from super().wrong()
        if self.shards not in (None, 1) or self.offload:
            yield "every rank of svd holds all weights; leave out shards and offload"
        if not self.init and not self.unet:
            yield "which UNet? give its settings under unet, or a model to start from with init"
        if self.init and (self.unet or self.image_encoder):
            yield "unet and image_encoder are for a new model; init brings its own"
        if self.lora and self.sigma_max is not None:
            yield f"sigma_max = {self.sigma_max:g}: adapters are sampled as the model that they are added to; leave it out"
        if not SPEEDS[0] <= self.rates[0] <= self.rates[1] <= SPEEDS[1]:
            yield f"rates = {list(self.rates)}: give two of {SPEEDS[0]:g} … {SPEEDS[1]:g} frames per second, the lower one first"
        if self.sample_every and not self.sample_pictures:
            yield f"sample_every = {self.sample_every}: clips of which pictures? name files under sample_pictures"
        for path in self.sample_pictures:
            if not path.is_file():
                yield f"sample_pictures: no file {path}"

    @classmethod
    def from_init(cls, init: str, values: dict[str, Any]) -> dict[str, Any]:
        from reelflow.adapters.hub import resolve
        from reelflow.adapters.svd import read_about

        folder: Path = resolve(init)
        if not folder.is_dir():
            raise ValueError(f"init: {folder} is a single file; give a folder of diffusers")
        about: ModelConfig = read_about(folder)
        return {"vae": folder / "vae"} | values | {"about": merge(about, values.get("about", {}))}

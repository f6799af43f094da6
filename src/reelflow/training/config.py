"""What a training run is: one strict file, every key documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field

from reelflow.config import FlowConfig, ModelConfig, Strict

Task = Literal["image", "generate", "extend", "edit"]


class Bucket(Strict):
    """Batches of one shape."""

    task: Task
    """image: first latent frames alone. generate: clips from their start. extend: clips without their first latent frame,
    prompt prefixed `(extend) `. edit: source then target clip, prompt prefixed `(v2v) `."""
    frames: int = Field(1, ge=1)
    """Latent frames of a clip (of each of the two clips of an edit)."""
    batch: int = Field(ge=1)
    share: float = Field(1.0, gt=0)
    """Relative share of the steps."""


class Stage(Strict):
    steps: int = Field(ge=1)
    buckets: tuple[Bucket, ...] = Field(min_length=1)
    denoiser: bool = True
    """Whether the denoiser learns here; from the score of a flow that knows nothing yet there is little to learn."""


class TextConfig(Strict):
    """A small T5 encoder trained with the flow."""

    width: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    vocabulary: int = Field(512, ge=300)


class TrainConfig(Strict):
    """`reelflow train CONFIG.yaml [key=value …]`; dotted keys reach inside."""

    about: ModelConfig
    """The model folder's own config.json."""
    flow: FlowConfig
    latents: Path
    """Folder of cached latents (`python -m reelflow.training.latents`)."""
    vae: Path
    """Folder of the video codec, copied into the trained model."""
    text: TextConfig | Path
    """A small T5 to train along, or the folder of a trained one, which stays as it is."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the flow. muon: orthogonalised momentum for the matrices of its layers, AdamW for all else, at the same rate."""
    lr: float = Field(5e-5, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    denoiser_lr: float = Field(1e-4, gt=0)
    warmup: int = Field(200, ge=0)
    """Steps of linear warm-up, then cosine to `min_lr`."""
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    grad_skip: bool = True
    """Skip steps whose gradient norm exceeds `grad_clip` after the first 100."""
    text_drop: float = Field(0.1, ge=0, le=1)
    ema: float = Field(0.999, ge=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    log_every: int = Field(20, ge=1)
    save_every: int = Field(200, ge=1)
    sample_every: int = Field(0, ge=0)
    """Steps between sample clips; 0: none."""
    sample_prompts: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage that `step`, 0 …, belongs to; the last one also serves later steps."""
        for stage in self.stages:
            if step < stage.steps:
                break
            step -= stage.steps
        return stage

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Read YAML and apply `key=value` overrides (dotted keys, YAML values). Raises ValueError naming file and key."""
        path = Path(path)
        try:
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; give the path of a training configuration") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds {type(values).__name__}, not keys and values")
        for override in overrides or []:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"override {override!r} is not key=value")
            *parents, leaf = key.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise ValueError(f"override {override!r}: {parent} has no keys inside")
            place[leaf] = yaml.safe_load(value)
        return cls.parse(values, str(path))

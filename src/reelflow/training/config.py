"""What a training run is: one strict file, every key documented. `RunConfig` is what all runs have, `TrainConfig` a flow's,
`training.svd.config` a diffusion model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate as sums
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import Field

from reelflow.config import FlowConfig, ModelConfig, Strict
from reelflow.data.config import DataConfig

if TYPE_CHECKING:
    from reelflow.training.svd.config import SvdConfig

Task = Literal["image", "generate", "extend", "edit", "animate"]


class AnyBucket(Strict):
    """Batches of one shape."""

    task: Task
    frames: int = Field(1, ge=1)
    """Latent frames of a clip (of each of the two clips of an edit)."""
    batch: int = Field(ge=1)
    share: float = Field(1.0, gt=0)
    """Relative share of the steps."""


class AnyStage(Strict):
    steps: int = Field(ge=1)
    buckets: tuple[AnyBucket, ...] = Field(min_length=1)


class Bucket(AnyBucket):
    """Batches of one shape, of a flow."""

    task: Literal["image", "generate", "extend", "edit"]
    """image: first latent frames alone. generate: clips from their start. extend: clips without their first latent frame,
    prompt prefixed `(extend) `. edit: source then target clip, prompt prefixed `(v2v) `."""
    drifted: bool = False
    """Of edits, what leads back to the source: the target's frames up to one that is drawn are those of a motion too fast or too slow,
    as a sampler has them that went astray, and only its first frame and those from there on are learned. Goes with `denoiser: false`."""


class Stage(AnyStage):
    buckets: tuple[Bucket, ...] = Field(min_length=1)
    denoiser: bool = True
    """Whether the denoiser learns here; from the score of a flow that knows nothing yet there is little to learn."""
    foresight: float = Field(default=0.0, ge=0)
    """Weight of a second loss, the error of what the flow expects of each latent frame from those before it alone
    (`training.foresight`): it learns sooner where things will be. Goes with `denoiser: false`, as its slope is no score."""
    antithetic: bool = False
    """Every clip of a batch twice, with its data noise and with the opposite: as much work as twice the batch, and half of the noise in
    its gradient, most of which comes from the data noise (antithetic variates)."""


class TextConfig(Strict):
    """A small T5 encoder trained with the flow."""

    width: int = Field(128, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    vocabulary: int = Field(512, ge=300)


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021): `W + alpha / rank · B A`, with W as it is and A, B trained."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(8.0, gt=0)
    targets: tuple[str, ...] = Field(("*.layers.*",), min_length=1)
    """Linear layers of the flow by name, `*` for any part of it: `deep_block.layers.*.attention.*`. Default: every
    transformer layer of all blocks and of the denoiser."""


class RunConfig(Strict):
    """What all training runs have."""

    init: str | None = None
    about: ModelConfig
    """The model folder's own config.json."""
    latents: Path | None = None
    data: DataConfig | None = None
    """Where clips and captions come from."""
    vae: Path
    """Folder of the video codec, copied into the trained model."""
    lora: LoraConfig | None = None
    """Train adapters in place of the weights of `init`; the result is one small file."""
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    accumulate: int = Field(1, ge=1)
    """Parts that every rank computes its rows of a batch in, one after the other: less memory, the same step."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices of the layers (with svd also for convolutions), AdamW for all else, at the
    same rate. adamw8bit: AdamW with its averages in 8 bits (torchao), also for the denoiser; a quarter of their memory."""
    lr: float = Field(5e-5, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup: int = Field(200, ge=0)
    """Steps of linear warm-up, then cosine to `min_lr`."""
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    grad_skip: bool = True
    """Skip steps whose gradient norm exceeds `grad_clip` after the first 100."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is sampled from and written at the end; 0: no average is kept."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the products in transformer layers (and convolutions of svd); weights, sums over ranks, norms and the flow's own values
    are float32 always."""
    device: str = "cpu"
    """cpu, or cuda: every rank takes the GPU of its number on its machine."""
    shards: int | None = Field(None, ge=1)
    """Ranks that hold the weights of the layers together (FSDP2), a divisor of all ranks; groups of that many work side by
    side. 1: every rank holds them all. None: all ranks on GPUs, 1 on CPUs. Flows only."""
    offload: bool = False
    """Keep sharded weights, their gradients and optimiser state in the CPU's memory; also for one GPU. Flows only."""
    recompute: bool = False
    """Activation checkpointing: keep only each layer's input, compute the rest again on the way back."""
    compile: bool = False
    """torch.compile every transformer layer (of svd: the norms); minutes at first, needs a C++ compiler or Triton."""
    seed: int = 0
    log_every: int = Field(20, ge=1)
    tensorboard: bool = False
    """Also write the log and the samples for TensorBoard, into the run's folder (pip install 'reelflow[train]')."""
    save_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints that stay; older ones are removed."""
    timeout: float = Field(10.0, gt=0)
    """Minutes without an answer after which another rank counts as lost; more than the first one needs for samples."""
    sample_every: int = Field(0, ge=0)
    """Steps between sample clips of the averaged weights, each with a contact sheet; 0: none."""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def place(self, step: int) -> int:
        """Number of the stage that `step`, 0 …, belongs to; the last one also serves later steps."""
        ends = sums(stage.steps for stage in self.stages)
        return next((index for index, end in enumerate(ends) if step < end), len(self.stages) - 1)

    def stage(self, step: int) -> AnyStage:
        """The stage that `step` belongs to."""
        return self.stages[self.place(step)]

    @classmethod
    def parse(cls, values: dict, source: str = "configuration") -> Self:
        """Validate `values`, with what `init` gives in place of what is absent. Raises ValueError in one line."""
        if isinstance(values.get("init"), str):
            values = cls.from_init(values["init"], values)
        found = super().parse(values, source)
        if wrong := next(found.wrong(), None):
            raise ValueError(f"{source}: {wrong}")
        return found

    @classmethod
    def from_init(cls, init: str, values: dict[str, Any]) -> dict[str, Any]:
        """The values, and what they leave open from the model to start from. Raises ValueError for an unknown model."""
        raise NotImplementedError

    def wrong(self) -> Iterator[str]:
        """Keys that do not go together."""
        if self.lora and not self.init:
            yield "lora adapts a model; say which one with init"
        if self.optimizer == "muon" and (self.lora or self.offload):
            yield f"optimizer = muon does not go with {'lora' if self.lora else 'offload'}; use adamw"

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Read YAML and apply `key=value` overrides (dotted keys, YAML values). Raises ValueError naming file and key."""
        return cls.parse(read_values(path, overrides), str(path))


class TrainConfig(RunConfig):
    """A flow: `reelflow train CONFIG.yaml [key=value …]`; dotted keys reach inside."""

    init: str | None = None
    """Model to start from: a packaged name, a model folder, a Hugging Face id. `about`, `flow`, `vae` and `text` are its own
    where they are not given; of `about` and `flow` single keys may be."""
    flow: FlowConfig
    latents: Path | None = None
    """Folder of prepared latents (`reelflow train prepare`); None: train on the clips of `data` as they are."""
    text: TextConfig | Path
    """A small T5 to train along, or the folder with `text_encoder/` and `tokenizer/` of a trained one, which stays as it is."""
    train_text: bool = False
    """Train the text encoder of that folder along; a new one always is."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    denoiser_lr: float = Field(1e-4, gt=0)
    """Peak of the denoiser's own warm-up and cosine, which run over the steps in which it learns."""
    text_drop: float = Field(0.1, ge=0, le=1)
    """Share of clips that lose their caption, so that guidance has an unconditional model."""
    noise_range: tuple[float, float] | None = None
    """Smallest and largest σ of the data noise, drawn for every clip; goes with `about.prompt.noise`, which tells the model.
    None: `flow.noise_std` always."""
    sample_prompts: tuple[str, ...] = ()
    """What sample clips show."""

    def stage(self, step: int) -> Stage:
        return self.stages[self.place(step)]

    def denoising(self, step: int) -> int:
        """Steps before `step` in which the denoiser learns."""
        begins = sums((stage.steps for stage in self.stages), initial=0)
        return sum(min(max(step - begin, 0), stage.steps) for stage, begin in zip(self.stages, begins, strict=False) if stage.denoiser)

    def wrong(self) -> Iterator[str]:
        if self.latents is None and self.data is None:
            yield "nothing to train on; say under data where the clips are, or give latents that were prepared"
        yield from super().wrong()
        new_text = isinstance(self.text, TextConfig)
        if self.lora and (self.train_text or new_text):
            yield "lora leaves the text encoder as it is; leave out train_text, and give a folder for text"
        if self.train_text and new_text:
            yield "train_text is for the folder of a trained encoder; a new one is trained anyway"
        foresees = [stage for stage in self.stages if stage.foresight]
        if self.flow.denoiser and any(stage.denoiser for stage in foresees):
            yield "a stage with foresight cannot train the denoiser, which needs the slope of the likelihood alone; add denoiser: false"
        drifting = [(stage, bucket) for stage in self.stages for bucket in stage.buckets if bucket.drifted]
        if any(bucket.task != "edit" or bucket.frames < 2 for _, bucket in drifting):
            yield "drifted is for buckets of the task edit with two latent frames or more: a source leads back"
        if self.flow.denoiser and any(stage.denoiser for stage, _ in drifting):
            yield "a stage with drifted edits cannot train the denoiser, which needs a whole clip's slope; add denoiser: false"
        if foresees and not self.flow.sos:
            yield "foresight hides tokens behind the start token, and flow.sos = false has none"
        if self.noise_range and not self.about.prompt.noise:
            yield "noise_range needs about.prompt.noise = true, so that the model is told the noise level"
        if self.noise_range and not 0 < self.noise_range[0] <= self.noise_range[1]:
            yield f"noise_range = {list(self.noise_range)}: give the smaller one first, both above 0"

    @classmethod
    def from_init(cls, init: str, values: dict[str, Any]) -> dict[str, Any]:
        from reelflow.adapters.hub import part_folder, resolve

        folder = resolve(init)
        about = ModelConfig.read(folder / "config.json")
        flow = FlowConfig.read(folder / "transformer" / "config.json")
        merged = {"about": merge(about, values.get("about", {})), "flow": merge(flow, values.get("flow", {}))}
        if "vae" not in values:
            merged["vae"] = part_folder(folder, "vae", about.parts)
        if "text" not in values:
            merged["text"] = folder
        return values | merged


def merge(own: Strict, given: Any) -> Any:
    """A model's own settings with those that are given, if those are settings at all."""
    return own.model_dump(mode="json") | given if isinstance(given, dict) else given


def read_values(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Keys and values of a YAML file, `key=value` overrides applied. Raises ValueError naming file and key."""
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
    return values


def load(path: str | Path, overrides: list[str] | None = None) -> TrainConfig | SvdConfig:
    """A configuration of whichever family: as `about.family` says, or the model of `init`. Raises ValueError as `RunConfig.load`."""
    values = read_values(path, overrides)
    about, init = values.get("about"), values.get("init")
    family = about.get("family") if isinstance(about, dict) else None
    if family is None and isinstance(init, str):
        from reelflow.adapters.hub import resolve
        from reelflow.adapters.svd import is_svd

        family = "svd" if is_svd(resolve(init)) else None
    if family != "svd":
        return TrainConfig.parse(values, str(path))
    from reelflow.training.svd.config import SvdConfig

    return SvdConfig.parse(values, str(path))

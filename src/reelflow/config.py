"""What a model is: strict, frozen, stored as JSON beside the weights.

`FlowConfig` is `transformer/config.json`, `ModelConfig` the folder's own `config.json`. An unknown key is an error, so
a misspelt option cannot pass for a default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Strict(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, errors in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, values: dict, source: str = "configuration") -> Self:
        """Validate `values`. Raises ValueError naming `source`, the key, the value and what is wrong, in one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "value"
            raise ValueError(f"{source}: {where} = {first['input']!r}: {first['msg']}") from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a JSON file. Raises ValueError naming the file and the offending key."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; a model folder has config.json and transformer/config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        return cls.parse(values, str(path))

    def write(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


class DenoiserConfig(Strict):
    """The learned denoiser (STARFlow-V, "flow-score matching")."""

    layers: int = Field(8, ge=1)
    width: int = Field(3072, ge=8)
    text: bool = True
    """Whether it reads the text, through a projection of its own."""
    look_ahead: int = Field(2, ge=1)
    """`A`: a query in latent frame f sees keys up to frame f + A − 1."""
    look_ahead_layers: Literal["all", "first"] = "all"
    """Layers with that look-ahead: all of them (published; the true look-ahead is layers · (A − 1) frames) or the first
    one only, the rest causal by frame, which makes one frame of latency exact."""
    window: int | None = Field(10, ge=1)
    """`G`: a query in frame f sees keys from frame f + A − 1 − G on; None sees all."""


class FlowConfig(Strict):
    """An autoregressive normalizing flow: shallow blocks inside a latent frame, one deep block over the video.

    Defaults are the published STARFlow settings; the options are those that published or derived models use.
    """

    channels: int = Field(ge=1)
    """`c`, values per latent place (48 for Wan 2.2, 4 for SD-VAE)."""
    width: int = Field(ge=8)
    """Transformer width of the shallow blocks."""
    deep_width: int = Field(ge=8)
    """Transformer width of the deep block."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Layers per block; the last entry is the deep block."""
    head_dim: int = Field(64, ge=2)
    num_heads: int | None = Field(None, ge=1)
    """Query heads; None: width / head_dim."""
    num_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads (grouped-query attention); None: as many as query heads."""
    window: int = Field(1, ge=1)
    """`W`: latent frames of the trained length (21 for STARFlow-V, 1 for images)."""
    text_tokens: int = Field(0, ge=0)
    """`L`: text tokens in front of the deep block's sequence; 0: no text."""
    text_dim: int = Field(0, ge=0)
    position_span: float = Field(gt=0)
    """`P` (`pt_seq_len`): rotary positions of a frame's rows and columns span about 0 … P."""
    positions: Literal["rotary", "rotary_half", "learned"] = "rotary"
    """Rotary on neighbouring pairs, rotary on halves (Hugging Face layout), or a learned absolute embedding."""
    learned_places: int | None = Field(None, ge=1)
    """Places of a latent frame (of an image), each with a learned embedding that is added to the inputs there; None: none. Rotary
    positions say how far apart two tokens are, this says where they are."""
    sos: bool = True
    """A learned start token; without it outputs shift by one and the first token is left as it is."""
    scale: Literal["softplus", "exp"] = "softplus"
    soft_clip: float = Field(4.0, ge=0)
    """`k` of k · tanh(o / k) on the block outputs; 0: off."""
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: bool = False
    post_norm: bool = False
    bias: bool = True
    noise_std: float = Field(0.3, gt=0)
    """`σ`, standard deviation of the data noise the model was trained with."""
    denoiser: DenoiserConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = [self.width, self.deep_width] + ([self.denoiser.width] if self.denoiser else [])
        for width in widths:
            if self.num_heads is None and width % self.head_dim:
                raise ValueError(f"width {width} is not a multiple of head_dim {self.head_dim}")
            heads = self.num_heads or width // self.head_dim
            if self.num_kv_heads and heads % self.num_kv_heads:
                raise ValueError(f"{heads} heads cannot share num_kv_heads = {self.num_kv_heads}; it must divide them")
        spatial = self.head_dim // 2 - (8 if self.text_tokens or self.window > 1 else 0)
        if self.positions != "learned" and (self.head_dim % 2 or spatial < 0 or spatial % 2):
            raise ValueError(f"head_dim = {self.head_dim} cannot be split over time, rows and columns; use 32, 64 or 128")
        if (self.text_tokens == 0) != (self.text_dim == 0):
            raise ValueError(f"text_tokens = {self.text_tokens} and text_dim = {self.text_dim}: both zero or neither")
        if self.positions == "learned" and self.learned_places is None:
            raise ValueError("positions = 'learned' needs learned_places, the number of an image's tokens")
        if self.positions == "learned" and self.window > 1:
            raise ValueError("positions = 'learned' is for images (window = 1)")
        return self


class PromptConfig(Strict):
    """What the prompt is wrapped in before tokenising."""

    fps: bool = True
    noise: bool = False
    aspect: bool = False


class ModelConfig(Strict):
    """A model folder: what its parts are and what it was trained for."""

    family: Literal["starflow-v", "starflow", "svd"]
    name: str
    revision: str = "1"
    licence: str = "unknown"
    size: int = Field(ge=8)
    """Side in pixels: frames have area size² at any aspect the model takes."""
    frames: int = Field(1, ge=1)
    """Frames of a clip at the trained length."""
    fps: float = Field(16, gt=0)
    latent_scale: float = Field(1.0, gt=0)
    """Latent frames after the first are multiplied by this before the flow (0.6 for STARFlow-V)."""
    guidance: float = Field(3.5, ge=0)
    temperature: float = Field(1.0, ge=0, le=1)
    """Standard deviation of the noise that a flow's clips are made from: below 1 the likelier clips, less various."""
    tasks: tuple[Literal["generate", "animate", "edit", "extend"], ...] = ("generate", "animate", "extend")
    """What it was trained for; likelihood and inversion work for every flow."""
    prompt: PromptConfig = PromptConfig()
    later_windows: Literal["same", "extend"] = "same"
    """What the deep block reads in windows beyond the trained length: the same text (published), or the prompt with the
    prefix `(extend) `, as clips without their first latent frame had it in training."""
    whole_edits: bool = False
    """Edits were learned from videos of the trained length alone: a shorter one is read as if its last frame stayed until then."""
    parts: dict[str, str] = Field(default_factory=dict)
    """Where parts missing from the folder come from: `vae`, `text_encoder`, `tokenizer` → Hugging Face id, with
    `:subfolder` where the part is not at its root."""

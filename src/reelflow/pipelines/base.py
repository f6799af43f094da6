"""The contract of every family: the same calls, the same results; what a family cannot do it says, naming the one that can."""

from __future__ import annotations

import json
import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reelflow.adapters.checkpoint import read_weights, written
from reelflow.adapters.precision import Precision
from reelflow.clip import Clip, heat_map
from reelflow.config import ModelConfig
from reelflow.media.picture import picture_rgb
from reelflow.version import VERSION

if TYPE_CHECKING:
    from reelflow.pipelines.loading import Asked

Device = str | torch.device
Picture = str | Path | Image.Image | np.ndarray | Clip
LONGEST = 3600
"""Seconds: what a clip in memory may have."""
Progress = Callable[[str, float], None]
"""Called with the phase and the share of it that is done, 0 … 1."""


def silent(phase: str, share: float) -> None:
    """No progress shown."""


def tokens_to_share(progress: Progress, total: int) -> Callable[[int], None]:
    """Tells `progress` of a sampler that counts tokens."""
    done = 0

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress("sampling", min(1.0, done / total))

    return step


@dataclass(frozen=True)
class Score:
    """Exact log-likelihood of a clip under a flow.

    The density is that of the model's input (see `reelflow.likelihood`): standardised latents of the clip's frames with
    noise of standard deviation `noise_std` from `seed` added, given the prompt.
    """

    log_prob: float
    """Nats."""
    bits_per_dim: float
    per_frame: list[float]
    """Nats of each latent frame, given those before it."""
    map: np.ndarray
    """Nats of each latent place, float32 (latent frames, h, w)."""
    noise_std: float
    seed: int
    dims: int
    clip: Clip = field(repr=False)
    """The frames that were scored, at the model's rate and size."""

    def heat_map(self) -> Clip:
        """Where and when the clip is improbable: bits per latent value beside the source; bright is surprising."""
        latent_frames = len(self.map)
        step = max(1, (len(self.clip) - 1) // max(1, latent_frames - 1))
        index = [0] + [1 + (frame - 1) // step for frame in range(1, len(self.clip))]
        return heat_map(-self.map[np.clip(index, 0, latent_frames - 1)], self.clip)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the frames."""
        values = {key: value for key, value in vars(self).items() if key != "clip"}
        return values | {"map": np.round(self.map, 3).tolist()}


@dataclass(frozen=True)
class Encoding:
    """A clip as the flow's noise, with what is needed to decode it.

    z: float32 (latent frames, channels, h, w). seed: of the data noise that was added; decoding takes the same noise away
    again, so that the latents come back exactly. Set it to None in an edited encoding to have its noise removed by the
    denoiser instead.
    """

    z: Tensor
    prompt: str
    fps: float
    seed: int | None
    model: str
    revision: str

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        from safetensors.torch import save_file

        about = {key: value for key, value in asdict(self).items() if key != "z"}
        with written(Path(path)) as temporary:
            save_file({"z": self.z.contiguous()}, temporary, metadata={"reelflow": json.dumps(about)})

    @classmethod
    def open(cls, path: str | Path) -> Encoding:
        """Read. Raises ValueError where the file is none of `save`'s."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; make one with: reelflow encode VIDEO -o z.safetensors")
        weights = read_weights(path)
        with safe_open(str(path), "pt") as file:
            said = (file.metadata() or {}).get("reelflow", "")
        try:
            return cls(z=weights["z"], **json.loads(said))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{path}: not an encoding; make one with: reelflow encode VIDEO -o z.safetensors") from None


class Pipeline:
    """One loaded model. Frames come and go as `Clip`s; a seed means the same clip on every device."""

    tasks: ClassVar[dict[str, str]] = {
        "generate": "starflow-v", "animate": "starflow-v", "edit": "starflow-v", "extend": "starflow-v",
        "score": "starflow-v", "encode": "starflow-v", "decode": "starflow-v",
    }  # fmt: skip
    """Task → a family that can do it."""

    options: ClassVar[frozenset[str]] = frozenset("guidance temperature sampler tolerance denoise ring certify stream".split())
    """What of the command line's sampling options it knows; those of a flow."""

    shares: ClassVar[bool] = False
    """Whether several processes can run one model together, under torchrun."""

    about: ModelConfig

    @classmethod
    def load(
        cls, source: Path, device: Device, precision: Precision = "auto", budget: int | None = None, asked: Asked | None = None
    ) -> Self:
        """Load a model folder or checkpoint file, within so many bytes of the device for the clip that is asked for."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, asked: Iterable[str], model: str) -> None:
        """Raise ValueError for a sampling option of another family."""
        for name in asked:
            if name not in cls.options:
                raise ValueError(f"{model} does not know --{name}; it knows --{', --'.join(sorted(cls.options))}")

    def generate(self, *args: Any, **options: Any) -> Clip:
        """`(prompt, …)`: text → video."""
        raise self.cannot("generate")

    def animate(self, *args: Any, **options: Any) -> Clip:
        """`(image, prompt="", …)`: picture (and text) → video that begins with it."""
        raise self.cannot("animate")

    def edit(self, *args: Any, **options: Any) -> Clip:
        """`(clip, prompt, …)`: video and instruction → video of the same length."""
        raise self.cannot("edit")

    def extend(self, *args: Any, **options: Any) -> Clip:
        """`(clip, prompt="", *, seconds, …)`: continue a video to `seconds` in all."""
        raise self.cannot("extend")

    def score(self, *args: Any, **options: Any) -> Score:
        """`(clip, prompt="", …)`: exact likelihood."""
        raise self.cannot("score")

    def encode(self, *args: Any, **options: Any) -> Encoding:
        """`(clip, prompt="", …)`: video → noise."""
        raise self.cannot("encode")

    def decode(self, *args: Any, **options: Any) -> Clip:
        """`(encoding, …)`: noise → video."""
        raise self.cannot("decode")

    def stream(self, *args: Any, **options: Any) -> Iterator[Clip]:
        """`(prompt, …)`: `generate` in pieces, as they are finished."""
        raise self.cannot("generate")

    def load_lora(self, file: str | Path, weight: float = 1.0) -> None:
        """`(file, weight=1.0)`: add what a LoRA learned (`reelflow train` with `lora`)."""
        raise ValueError(f"{self.about.name} ({self.about.family}) takes no LoRA; use a starflow-v model")

    def cannot(self, task: str) -> ValueError:
        return ValueError(f"{self.about.name} ({self.about.family}) does not {task}; use a {self.tasks[task]} model")

    def require(self, task: str) -> None:
        """Raise ValueError where the model was not trained for `task`."""
        if task not in self.about.tasks:
            raise ValueError(f"{self.about.name} was not trained to {task} (it can: {', '.join(self.about.tasks)}); use another model")

    def made(self, task: str, prompt: str, seed: int | None, **settings: Any) -> dict[str, Any]:
        """Metadata of a result: how it was made, and that it is AI-generated."""
        about = self.about
        return {
            "ai_generated": True, "software": "reelflow", "version": VERSION, "model": about.name, "revision": about.revision,
            "family": about.family, "licence": about.licence, "task": task, "prompt": prompt, "seed": seed, "settings": settings,
        }  # fmt: skip


def new_seed(seed: int | None) -> int:
    """The seed, or a random one. Raises ValueError outside 0 … 2^63 − 1."""
    if seed is None:
        return secrets.randbelow(2**31)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} is not usable; give a whole number from 0 to 2^63 − 1")
    return seed


def picture(source: Picture) -> Clip:
    """The first frame of whatever shows a picture: a path, a PIL image (any mode), an array (H, W, 3) uint8, a clip."""
    if isinstance(source, Clip):
        return source[:1]
    if isinstance(source, str | Path):
        return Clip.open(source, max_frames=1)
    if isinstance(source, Image.Image):
        source = picture_rgb(source)
    return Clip(source[None], 16)


def say(message: str) -> None:
    """Tell the user of something done to the input (the command line prints it as one line)."""
    warnings.warn(message, UserWarning, stacklevel=3)


def spoken(prompt: str, task: str) -> str:
    """The prompt of a task that needs one. Raises ValueError where it is empty."""
    if not prompt.strip():
        raise ValueError(f"the prompt {prompt!r} is empty; say what {'should change' if task == 'edit' else 'the video should show'}")
    return prompt


def check_length(seconds: float | None, frames: int | None) -> None:
    """Raise ValueError for a length that no model makes: both given, not above 0, or over `LONGEST`."""
    if seconds is not None and frames is not None:
        raise ValueError(f"seconds {seconds:g} and frames {frames} are both given; give one of them")
    if seconds is not None and positive("seconds", seconds) > LONGEST:
        raise ValueError(f"seconds {seconds:g} is over the limit of {LONGEST}; make shorter clips and join them")
    if frames is not None and not 1 <= frames <= 30 * LONGEST:
        raise ValueError(f"frames {frames} is not usable; give 1 … {30 * LONGEST}")


def positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value} is not usable; give a number above 0")
    return value

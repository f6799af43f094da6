"""A memory budget for Stable Video Diffusion: the quickest way of running it that keeps within.

What is worked on is counted, not guessed: the code that will run is run on tensors without values (torch's FakeTensorMode), and the
most that lives at a time is counted. Not counted: what an allocator loses between tensors, and libraries' workspaces; `RESERVE`
is for both.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reelflow.pipelines.account import RESERVE
from reelflow.pipelines.budget import words
from reelflow.pipelines.loading import Asked as Wanted
from reelflow.pipelines.offload import Parts
from reelflow.pipelines.svd.blocks import CPU_PIECE, PIECE, THRIFTY_PIECE, Care, caring
from reelflow.pipelines.svd.picture import clip_view
from reelflow.pipelines.svd.sampling import rows, velocity
from reelflow.pipelines.trial import Peak

if TYPE_CHECKING:
    from reelflow.pipelines.svd.pipeline import SvdPipeline

P = TypeVar("P", bound="SvdPipeline")
STAGES = {"embedding": "image_encoder", "encoding": "encoder", "sampling": "denoiser", "decoding": "decoder"}
"""Stage → the part of the pipeline that it uses."""


@dataclass(frozen=True)
class Way:
    """A way of running a model. turns: each part is on the device only while it is used, and otherwise in the host's memory.
    thrifty: the rows of guidance one after the other, smaller pieces, `Care.again`. All give the same clip up to rounding.
    """

    turns: bool = False
    thrifty: bool = False

    def care(self, device: str) -> Care:
        return Care(THRIFTY_PIECE if device != "cpu" else None, True) if self.thrifty else Care()


@dataclass(frozen=True)
class Asked:
    """A clip. guided: whether guidance has rows of its own."""

    frames: int
    height: int
    width: int
    guided: bool
    clips: int = 1

    def __str__(self) -> str:
        several = f"{self.clips} clips of " if self.clips > 1 else ""
        return f"{several}{self.frames} frames of {self.width} × {self.height}{' with guidance' if self.guided else ''}"


@dataclass
class Account(Generic[P]):
    """What a loaded pipeline needs on a device, by way and clip; it may be anywhere itself."""

    pipe: P
    device: str
    counted: dict[tuple[str, bool, Asked], int] = field(default_factory=dict)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of each part."""
        return {part: _bytes(getattr(self.pipe, part)) for part in STAGES.values()}

    def stages(self, way: Way, asked: Asked) -> dict[str, int]:
        """What is on the device in each stage: the reserve, the weights that are there then, and what is worked on."""
        reserve = RESERVE.get(self.device, RESERVE["cuda"])
        weights, whole = self.weights, sum(self.weights.values())
        return {
            stage: reserve + (weights[part] if way.turns else whole) + self.work(stage, way, asked) for stage, part in STAGES.items()
        }

    def need(self, way: Way, asked: Asked) -> int:
        return max(self.stages(way, asked).values())

    def work(self, stage: str, way: Way, asked: Asked) -> int:
        """Bytes besides the weights."""
        key = stage, way.thrifty, asked
        if key not in self.counted:
            run: Callable[[Asked], Any] = getattr(self, f"_{stage}")
            usual = self._largest(asked) // 32 if self.device == "cpu" else PIECE  # the CPU's own are so many that counting takes minutes
            how = way.care(self.device)
            how = how._replace(piece=how.piece or max(CPU_PIECE, usual))
            with torch.no_grad(), caring(how), FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
                found = run(asked)
            del found
            self.counted[key] = peak.most
        return self.counted[key]

    def _largest(self, asked: Asked) -> int:
        """Bytes of a tensor of a whole clip at full resolution."""
        weight = self.pipe.decoder.conv_out.weight
        return asked.frames * asked.height * asked.width * weight.shape[1] * weight.element_size()

    def _latents(self, asked: Asked, *leading: int) -> Tensor:
        unit = self.pipe.factor
        return torch.empty(asked.clips, *leading, self.pipe.channels, asked.height // unit, asked.width // unit)

    def _embedding(self, asked: Asked) -> Any:
        shown, tower = torch.empty(asked.clips, 3, asked.height, asked.width), self.pipe.image_encoder
        return tower(clip_view(shown, *self.pipe.clip_norm).to(tower.visual_projection.weight.dtype))

    def _encoding(self, asked: Asked) -> tuple[Tensor, ...]:
        shown = torch.empty(asked.clips, 3, asked.height, asked.width)
        return self._latents(asked, asked.frames), shown, self.pipe.encoder(shown + 0)

    def _sampling(self, asked: Asked) -> tuple[Tensor, ...]:
        pipe, width = self.pipe, self.pipe.image_encoder.visual_projection.weight.shape[0]
        noise, states = self._latents(asked, asked.frames), torch.empty(asked.clips, width)
        times, ids = torch.empty(25), [0.0, 0.0, 0.0]
        told = pipe.denoiser.conditions(self._latents(asked), states, ids, times, asked.frames, asked.guided, None)
        return noise, *velocity(pipe.denoiser, noise + 0, rows(told), torch.zeros(1, dtype=torch.long), None)

    def _decoding(self, asked: Asked) -> Tensor:
        return self.pipe.decoder(self._latents(asked, asked.frames))


SMALLER = "give that, or fewer --frames, or a smaller --size"


@dataclass(frozen=True)
class Plan(Generic[P]):
    """How a model is run within a budget, and for which clip that was counted."""

    account: Account[P] = field(repr=False, compare=False)
    budget: int
    precision: str
    device: torch.device
    way: Way
    asked: Asked

    @property
    def care(self) -> Care:
        return self.way.care(self.device.type)

    def settle(self, pipe: SvdPipeline) -> None:
        """Put the parts where they belong."""
        for part in () if self.way.turns else STAGES.values():
            getattr(pipe, part).to(self.device)

    def use(self, part: str) -> AbstractContextManager[None]:
        """Have a part on the device."""
        return Parts(self.device, {part: (getattr(self.account.pipe, part), ())}).use(part) if self.way.turns else nullcontext()

    def check(self, frames: int, height: int, width: int, guided: bool, clips: int) -> None:
        """Raise ValueError for a clip that does not fit the way that was chosen."""
        asked = Asked(frames, height, width, guided, clips)
        need = self.account.need(self.way, asked)
        if need > self.budget:
            raise ValueError(f"memory budget {words(self.budget)}: {asked} need {words(need)} as the model was loaded; {SMALLER}")

    def about(self) -> dict[str, Any]:
        """For the metadata: budget, what was counted in each stage, and the way."""
        counted = self.account.stages(self.way, self.asked)
        return {"budget": self.budget, "counted": counted, "precision": self.precision, **asdict(self.way)}

    def __str__(self) -> str:
        how = [self.precision, *["parts take turns on the device"] * self.way.turns]
        how += ["small pieces" + (", guidance row by row" if self.asked.guided else "")] * self.way.thrifty
        return f"memory: {', '.join(how)}; {words(self.account.need(self.way, self.asked))} of {words(self.budget)}"


def choose(
    load: Callable[[str], P], precisions: list[str], device: torch.device, budget: int, asked: Wanted | None = None
) -> Plan[P]:
    """The first way that fits, of the best precision that does; its pipeline is that of the plan's account.

    Args:
        load: a pipeline in the host's memory, in a precision.
        asked: the clip that it is to make; by default one of its trained length and size.

    Raises:
        ValueError: nothing fits; says the least that does.
    """
    ways = [Way(), Way(thrifty=True)] if device.type == "cpu" else [Way(), Way(turns=True), Way(turns=True, thrifty=True)]
    for precision in precisions:
        pipe = load(precision)
        account, clip = Account(pipe, device.type), clip_of(pipe, asked or Wanted())
        for way in ways:
            if account.need(way, clip) <= budget:
                return Plan(account, budget, precision, device, way, clip)
    least = f"{clip} need at least {words(account.need(ways[-1], clip))} in {precision}"
    other = " or --precision bfloat16," * (precisions == ["float32"])
    raise ValueError(f"memory budget {words(budget)} is too small: {least};{other} {SMALLER}")


def clip_of(pipe: SvdPipeline, wanted: Wanted) -> Asked:
    """The clip that a budget is for, as this family makes it."""
    height, width = wanted.size[::-1] if wanted.size else pipe.frame_size(wanted.aspect)
    frames = wanted.frames or (max(1, round(wanted.seconds * pipe.about.fps)) if wanted.seconds else pipe.about.frames)
    guidance = pipe.about.guidance if wanted.guidance is None else wanted.guidance
    return Asked(pipe.about.frames if wanted.task == "extend" else frames, height, width, guidance != 1)


def _bytes(module: nn.Module) -> int:
    """Of a module's tensors, each storage once."""
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*module.parameters(), *module.buffers())}
    return sum(held.values())


__all__ = ["Account", "Asked", "Plan", "Way", "choose"]

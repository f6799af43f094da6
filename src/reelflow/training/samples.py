"""Clips of a training run as it goes: what the averaged weights make now, and its contact sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reelflow.clip import Clip, contact_sheet
from reelflow.training import parallel
from reelflow.training.export import averaged
from reelflow.training.flow import FlowObjective
from reelflow.training.trainer import Trainer

if TYPE_CHECKING:
    from reelflow.training.svd.objective import SvdObjective


def write_samples(trainer: Trainer[Any]) -> None:
    """A clip and its contact sheet per sample prompt (of svd: picture), seed 0; the first rank writes, the others wait."""
    of_flow = isinstance(trainer.objective, FlowObjective)
    clips = clips_of_flow(trainer) if of_flow else clips_of_svd(trainer) if trainer.ranks.first else {}
    folder = trainer.folder / "samples"
    for index, (name, clip) in enumerate(clips.items()):
        folder.mkdir(exist_ok=True)
        sheet, stem = contact_sheet(clip, columns=9, tile=96), f"{trainer.step:06d}-{index}"
        sheet.save(folder / f"{stem}.png")
        clip.save(folder / f"{stem}.mp4")
        if trainer.log:
            trainer.log.picture(f"sample/{name}", sheet, trainer.step)
    with parallel.answering(trainer.standing):
        trainer.ranks.meet()


def clips_of_flow(trainer: Trainer[FlowObjective]) -> dict[str, Clip]:
    """By prompt. All ranks call it, the first one gets them."""
    pipe, prompts = averaged(trainer), list(trainer.objective.config.sample_prompts)
    return dict(zip(prompts, pipe.generate_batch(prompts, [0] * len(prompts)), strict=True)) if pipe and prompts else {}


def clips_of_svd(trainer: Trainer[SvdObjective]) -> dict[str, Clip]:
    """By the name of the picture that they begin with."""
    from reelflow.pipelines.svd import SvdPipeline
    from reelflow.training.svd.export import averaged_parts

    pipe = SvdPipeline(averaged_parts(trainer))
    return {path.name: pipe.animate(path, seed=0) for path in trainer.objective.config.sample_pictures}


__all__ = ["write_samples"]

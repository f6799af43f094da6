"""What a model is trained on: the `data:` of a training configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from reelflow.config import Strict
from reelflow.data.scene import MOTIONS


def _several(value: Any) -> Any:
    """One entry may be written without a list."""
    return (value,) if isinstance(value, str | Path) else value


def _known(motion: str) -> str:
    if motion not in MOTIONS:
        raise ValueError(f"motion {motion!r} is not in toybox; use some of: {', '.join(MOTIONS)}")
    return motion


Motion = Annotated[str, AfterValidator(_known)]


class ToyboxData(Strict):
    """Clips rendered on the fly (`reelflow.data.toybox`)."""

    count: int = Field(4096, ge=0)
    """Clips of `frames` frames."""
    pictures: int = Field(0, ge=0)
    """Single pictures, of other scenes."""
    edits: int = Field(0, ge=0)
    """Pairs of clips of `edit_frames` frames, the caption an instruction."""
    pairs: float = Field(0.25, ge=0, le=1)
    """Share of scenes with two things; of edits always a quarter."""
    motions: tuple[Motion, ...] = Field(MOTIONS, min_length=1)
    """What things do, in clips and pictures; what is named twice comes twice as often."""
    seed: int = Field(0, ge=0)


class HubData(Strict):
    """A dataset that the library `datasets` reads: from huggingface.co by name, or from a folder."""

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit; give a commit if a run is to be repeated."""
    media: str | None = None
    """Column of the videos or pictures; None: the only one there is."""


class DataConfig(Strict):
    """Where clips and their captions come from, and what is taken of each. Several sources are read as one."""

    folder: Annotated[tuple[Path, ...], BeforeValidator(_several)] = ()
    """Folders of videos and pictures with captions: a `.txt` of the same name beside each, or `metadata.jsonl` or
    `metadata.csv` with the columns `file_name` and `caption`; `source_file_name` makes a row an edit of that clip."""
    shards: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    """WebDataset tar files: paths (`*`, `{000..099}`) or URLs (http, https, s3, gs, hf)."""
    hub: HubData | None = None
    toybox: ToyboxData | None = None
    caption: str = "caption"
    """Column or key of the caption, in metadata, `.json` members and datasets; a list holds several phrasings."""
    frames: int | None = Field(None, ge=1)
    """Frames of a prepared clip, at the model's rate, 1 + 4k; None: the model's own."""
    min_frames: int | None = Field(None, ge=1)
    """Videos shorter than this are left out; None: `frames`, or, of clips that are not prepared, what the shortest bucket needs."""
    edit_frames: int | None = Field(None, ge=1)
    """Frames of each clip of a prepared edit; None: half of `frames`."""
    crops: int = Field(1, ge=1)
    """Prepared clips per video, each from another place of it."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of the picture is used, where its aspect is not one of the model's."""
    posterior: Literal["sample", "mean"] = "sample"
    """Latents as drawn from the codec's posterior, anew at every use, as STARFlow-V was trained; or its mean: half the disk."""
    text_states: bool = False
    """Also prepare what the text encoder makes of every prompt; for one that is not trained."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """Stop when more clips than this cannot be used, judged from 50 clips on and at the end."""
    workers: int = Field(4, ge=1)
    """Threads that read and decode."""
    prefetch: int = Field(2, ge=1)
    """Batches decoded ahead of the one that is asked for."""
    cache: Path | None = None
    """Folder for copies of remote shards and datasets, where they are trained on without being prepared."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not (self.folder or self.shards or self.hub or self.toybox):
            raise ValueError("data names no source; give folder, shards, hub or toybox")
        if self.min_frames and self.frames and self.min_frames > self.frames:
            raise ValueError(f"min_frames = {self.min_frames} is more than frames = {self.frames}")
        return self

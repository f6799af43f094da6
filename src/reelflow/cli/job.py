"""One command on one model: what can be checked is checked, then the model is loaded, and the result written and told."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelflow.cli.options import Diffusing, Making, OnModel, Part, Solving, Writing
from reelflow.cli.ranks import first
from reelflow.cli.screen import Report, Screen

if TYPE_CHECKING:
    from reelflow.clip import Clip
    from reelflow.pipelines import Pipeline
    from reelflow.pipelines.loading import Asked
    from reelflow.pipelines.starflow import Sampling
    from reelflow.pipelines.svd import Diffusion


def check_writable(path: str | Path) -> None:
    """Raise ValueError where no file can be made beside `path`."""
    folder = Path(path).parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written, {folder}: {error.strerror}; choose another folder") from None


def check_file(path: str | Path, suffix: str) -> None:
    """Raise ValueError where `path` does not end with `suffix` or cannot be written."""
    if Path(path).suffix.lower() != suffix or Path(path).is_dir():
        raise ValueError(f"{path} is not a name for the result; give a file name that ends with {suffix}")
    check_writable(path)


def check_clip_output(path: str | Path, still: bool = False) -> None:
    """Raise ValueError where no clip, or with `still` no clip of one frame, can be written to `path`."""
    from reelflow.clip import check_output

    if check_output(path) == ".png" and not still:
        raise ValueError(f"{path} holds one frame; use .mp4, .webm, .gif, a folder, or ask for --frames 1")
    check_writable(path)


def new_name(words: str, seed: int) -> str:
    """A name in the current folder that nothing has yet: the words, the seed, and a number where needed."""
    slug = re.sub(r"[^\w]+", "-", words.lower()).strip("-_")[:50].rstrip("-") or "clip"
    names = (f"{slug}-{seed}{suffix}.mp4" for suffix in ("", *(f"-{i}" for i in range(1, 10_000))))
    return next(name for name in names if not Path(name).exists())


class Job:
    """A command while it runs."""

    options: OnModel

    def __init__(self, options: OnModel):
        self.options, self.began = options, time.perf_counter()
        self.screen = Screen(options.json, options.quiet)
        self.report: Report = lambda phase, share: None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Progress on the screen until the block ends."""
        with self.screen.progress() as self.report:
            self.report("starting", 0.0)
            yield

    def read(self, video: str, part: Part) -> Clip:
        """A part of a video file."""
        from reelflow.clip import Clip

        self.report("reading", 0.0)
        return Clip.open(video, part.max_frames, part.start)

    def load(self, **clip: Any) -> Pipeline:
        """The model; says the licence of published weights. `clip`: of a command that makes one, what its memory budget is for."""
        import reelflow
        from reelflow.adapters.hub import licence_notice
        from reelflow.adapters.lora import Lora, parse

        self.report("loading", 0.0)
        options = self.options
        loras = [parse(text) for text in options.lora or ()] if isinstance(options, Making) else []
        for file, _ in loras:
            Lora.open(file)
        clip["size"] = self.more.get("size") if isinstance(self, ClipJob) else None
        fitting = within(options, clip) if isinstance(options, Making) else ()
        pipe = reelflow.load(options.model, options.device, options.precision, *fitting)
        for file, weight in loras:
            pipe.load_lora(file, weight)
        notice = licence_notice(options.model) or licence_notice(pipe.about.licence)
        if notice:
            warnings.warn(notice, UserWarning, stacklevel=1)
        return pipe

    @property
    def took(self) -> float:
        """Seconds since the command began."""
        return round(time.perf_counter() - self.began, 2)


class ClipJob(Job):
    """A command that makes a clip."""

    options: Writing

    def __init__(self, options: Writing, diffusing: Diffusing | None = None):
        super().__init__(options)
        self.diffusing = diffusing or Diffusing()

    def settle(self, words: str, seed: int | None, still: bool = False, asked: tuple[str, ...] = ()) -> None:
        """Fix seed, settings and place. Raises ValueError for those that cannot be used; `still`: a picture serves too.

        asked: options given besides those of the dataclasses.
        """
        from reelflow.pipelines import kind
        from reelflow.pipelines.base import new_seed
        from reelflow.pipelines.svd import SvdPipeline

        options, diffusing = self.options, self.diffusing
        if isinstance(options, Making) and options.memory_budget is not None:
            from reelflow.pipelines.budget import parse

            parse(options.memory_budget)
        self.seed, flows = new_seed(seed), sampling(options)
        diffuses = diffusion(getattr(options, "guidance", None), diffusing)
        self.more = {name: value for name, value in (("size", size(diffusing.size)), ("first", getattr(diffusing, "first", None))) if value}
        family = kind(options.model, options.precision)
        family.check_options([*given(options, diffusing), *asked], options.model)
        self.sampling: Sampling | Diffusion = diffuses if family is SvdPipeline else flows
        self.output = self.options.output or new_name(words, self.seed)
        if first():
            check_clip_output(self.output, still)

    def write(self, clip: Clip) -> tuple[Clip, int]:
        """Write a clip. Returns it, and its frames."""
        self.report("writing", 0.0)
        if first():
            clip.save(self.output, metadata=self.options.metadata)
        return clip, len(clip)

    def write_pieces(self, pieces: Iterator[Clip]) -> tuple[Clip, int]:
        """Write frames as they come. Returns the first piece, and how many frames there were in all."""
        from reelflow.media.write import ClipWriter

        start = next(pieces)
        if not first():
            return start, len(start) + sum(map(len, pieces))
        metadata = start.metadata if self.options.metadata else None
        with ClipWriter(self.output, start.fps, start.height, start.width, metadata) as out:
            out.write(start.frames)
            for piece in pieces:
                out.write(piece.frames)
        return start, out.count

    def tell(self, clip: Clip, frames: int | None = None) -> None:
        """One line: file, frames × size, seconds, seed, passes, time. `frames`: all of them, where `clip` is a first piece."""
        made, frames = clip.metadata, frames or len(clip)
        seconds = frames / clip.fps
        values: dict[str, Any] = {
            "file": self.output, "frames": frames, "width": clip.width, "height": clip.height, "fps": clip.fps,
            "seconds": round(seconds, 3), "seed": made["seed"], "model": made["model"], "revision": made["revision"],
            "settings": made["settings"], "times": made["seconds"], "took": self.took,
        }  # fmt: skip
        words = f"{self.output}: {frames} frames × {clip.width} × {clip.height}, {seconds:.2f} s at {clip.fps:g} per second"
        words += f" · seed {made['seed']}"
        if reports := made.get("reports"):
            values["reports"] = reports
            passes = ", ".join(f"{report['passes']} {kind}" for kind, report in reports.items())
            words += f" · {passes} passes"
        if certificate := made.get("certificate"):
            values["certificate"] = certificate
            words += f" · residual {certificate['largest']:.1g} σ at most, {certificate['rms']:.1g} σ rms"
        if waited := made["seconds"].get("first_frame"):
            words += f" · first frame after {waited:.1f} s"
        self.screen.result(values, f"{words} · took {self.took:.1f} s")


def within(options: Making, clip: dict[str, Any]) -> tuple[str, Asked] | tuple[()]:
    """The memory budget, if there is one, and the clip that it is for."""
    from reelflow.pipelines.loading import Asked

    if options.memory_budget is None:
        return ()
    how: dict[str, Any] = {"guidance": options.guidance, "ring": options.ring, "denoise": options.denoise, "certify": options.certify}
    return options.memory_budget, Asked(**how, **{name: value for name, value in clip.items() if value is not None})


def given(*options: object) -> list[str]:
    """Names of the sampling options of any family that are not at their defaults."""
    from reelflow.pipelines import Pipeline
    from reelflow.pipelines.svd import SvdPipeline

    changed = [f.name for some in options for f in fields(some) if getattr(some, f.name) != f.default]  # type: ignore[arg-type]
    return [name for name in (name.replace("_", "-") for name in changed) if name in Pipeline.options | SvdPipeline.options]


def sampling(options: Solving) -> Sampling:
    """The settings as flows take them. Raises ValueError for values that are not usable."""
    from reelflow.pipelines.starflow import Sampling
    from reelflow.sampling import Schedule

    schedule = Schedule(options.sampler, options.tolerance)
    if isinstance(options, Making):
        how = {name: getattr(options, name) for name in ("guidance", "temperature", "denoise", "ring", "certify")}
        return Sampling(schedule=schedule, **how)
    return Sampling(schedule=schedule)


def diffusion(guidance: float | None, options: Diffusing) -> Diffusion:
    """The settings as Stable Video Diffusion takes them. Raises ValueError for values that are not usable."""
    from reelflow.pipelines.svd import Diffusion

    names = {f.name for f in fields(Diffusion)} & {f.name for f in fields(options)}
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "guided" in chosen:
        chosen["guided"] = levels(chosen["guided"])
    return Diffusion(guidance=guidance, **chosen)


def levels(text: str) -> tuple[float, float]:
    """(low, high) of `1-100`. Raises ValueError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if not found:
        raise ValueError(f"guided {text!r} is not LOW-HIGH, two noise levels such as 1-100")
    return float(found[1]), float(found[2])


def size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `1024x576`. Raises ValueError for other texts."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not found:
        raise ValueError(f"size {text!r} is not WIDTHxHEIGHT in pixels, such as 1024x576")
    return int(found[1]), int(found[2])

"""generate, animate, edit, extend: commands that make a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reelflow.cli.job import ClipJob
from reelflow.cli.options import Diffusing, Length, Making, Painting, Part, takes

Video = Annotated[str, typer.Argument(metavar="VIDEO", help="mp4, mov, mkv, webm, avi, gif, or a folder of numbered pictures.")]
OptionalPrompt = Annotated[str, typer.Argument(metavar="[PROMPT]", help="What happens, in words.", show_default=False)]


@takes(length=Length, options=Making, diffusing=Painting)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.")],
    length: Length,
    options: Making,
    diffusing: Painting,
    aspect: Annotated[
        str | None,
        typer.Option(
            metavar="W:H",
            help="Width to height: 1:1, 2:3, 3:2, 16:9, 9:16, 4:5, 5:4, 21:9 or 9:21; some models make 1:1 only. "
            "\\[default: 1:1; svd: 16:9]",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write every frame as soon as it is finished, and say when the first one was.")
    ] = False,
) -> None:
    """Make a video from a prompt.

    reelflow generate "a red ball moves right on a black background" --seed 0 -o ball.mp4
    """
    job = ClipJob(options, diffusing)
    with job.running():
        from reelflow.pipelines.base import check_length, spoken

        spoken(prompt, "generate")
        check_length(length.seconds, length.frames)
        job.settle(prompt, options.seed, still=length.frames == 1, asked=("stream",) * stream)
        pipe = job.load(seconds=length.seconds, frames=length.frames, aspect=aspect, stream=stream)
        how: dict[str, Any] = {"seed": job.seed, "sampling": job.sampling, "progress": job.report, **job.more}
        how |= {"seconds": length.seconds, "frames": length.frames} | ({"aspect": aspect} if aspect else {})
        clip, frames = job.write_pieces(pipe.stream(prompt, **how)) if stream else job.write(pipe.generate(prompt, **how))
    job.tell(clip, frames)


@takes(length=Length, options=Making, diffusing=Diffusing)
def animate(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture, any size and mode; of a video the first frame.")],
    length: Length,
    options: Making,
    diffusing: Diffusing,
    prompt: OptionalPrompt = "",
) -> None:
    """Make a video that begins with a picture.

    reelflow animate photo.jpg "a red ball moves right" -o moving.mp4

    reelflow animate photo.jpg --model svd-xt --motion 127 -o moving.mp4
    """
    job = ClipJob(options, diffusing)
    with job.running():
        from reelflow.pipelines.base import check_length, picture

        check_length(length.seconds, length.frames)
        job.settle(prompt or f"animated {Path(image).stem}", options.seed)
        first = picture(image)
        clip = job.load(seconds=length.seconds, frames=length.frames, task="animate").animate(
            first, prompt, seed=job.seed, seconds=length.seconds, frames=length.frames, sampling=job.sampling, progress=job.report,
            **job.more,
        )  # fmt: skip
        job.write(clip)
    job.tell(clip)


@takes(part=Part, options=Making)
def edit(
    video: Video,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change.")],
    part: Part,
    options: Making,
) -> None:
    """Change a video as an instruction says; the result is as long as the video, at most the trained length.

    reelflow edit ball.mp4 "make the ball blue" -o blue.mp4
    """
    job = ClipJob(options)
    with job.running():
        from reelflow.pipelines.base import spoken

        spoken(prompt, "edit")
        job.settle(prompt, options.seed)
        source = job.read(video, part)
        clip = job.load(task="edit").edit(source, prompt, seed=job.seed, sampling=job.sampling, progress=job.report)
        job.write(clip)
    job.tell(clip)


@takes(part=Part, options=Making, diffusing=Diffusing)
def extend(
    video: Video,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length in all, in seconds; more than the video has.")],
    part: Part,
    options: Making,
    diffusing: Diffusing,
    prompt: OptionalPrompt = "",
) -> None:
    """Continue a video; its own frames stay as they are, at the model's size and rate.

    reelflow extend ball.mp4 --seconds 30 -o long.mp4
    """
    job = ClipJob(options, diffusing)
    with job.running():
        from reelflow.pipelines.base import check_length

        check_length(seconds, None)
        job.settle(prompt or f"extended {Path(video).stem}", options.seed)
        source = job.read(video, part)
        clip = job.load(seconds=seconds, task="extend").extend(
            source, prompt, seconds=seconds, seed=job.seed, sampling=job.sampling, progress=job.report, **job.more
        )
        job.write(clip)
    job.tell(clip)


def add_to(app: typer.Typer) -> None:
    for command in (generate, animate, edit, extend):
        app.command()(command)

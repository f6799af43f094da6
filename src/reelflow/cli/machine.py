"""doctor, bench, evaluate: what this machine can run, how fast, and how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reelflow.cli.inner import handing_on
from reelflow.cli.job import Job
from reelflow.cli.options import OnModel, Printing, Solving, takes
from reelflow.cli.ranks import first
from reelflow.cli.screen import Screen

evaluate = typer.Typer(no_args_is_help=True)


@takes(options=Printing)
def doctor(options: Printing) -> None:
    """Say what this machine can run: processor, memory, GPU, libraries, encoders, models, and what would be chosen."""
    from reelflow.evaluation.doctor import examine

    found = examine()
    rows = [(topic, _flat(values)) for topic, values in found.items()]
    Screen(options.json, options.quiet).table(found, "reelflow doctor", ("topic", "found"), rows)


@takes(options=OnModel)
def bench(
    options: OnModel,
    frames: Annotated[
        int | None, typer.Option(metavar="1+4k", help="Frames of the clip. \\[default: the trained length, without --profile the most]")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N≥1", min=1, help="How often each schedule is timed; the median counts.")] = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead: where the time of one clip goes, from prompt to file, by phase and kind of work.")
    ] = False,
) -> None:
    """Measure sampling: tokens per second, passes, seconds to the first frame, memory, error against sequential in float32.

    reelflow bench --model mini --json

    Measure training: reelflow bench train CONFIG.yaml (see its --help). Stable Video Diffusion: reelflow bench svd.
    """
    job = Job(options)
    with job.running():
        from reelflow.evaluation import bench as sampling
        from reelflow.evaluation import profile as whole

        if profile:
            found = whole.run(options.model, options.device, options.precision, frames, repeats, progress=job.report)
        else:
            asked = {options.precision: None}
            found = sampling.run(options.model, options.device, asked, frames=frames, repeats=repeats, progress=job.report)
        words = (whole if profile else sampling).table(found)
    job.screen.result(found, words)


@takes(options=Printing)
def bench_train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A training configuration; its data is not read. See examples/.")],
    options: Printing,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings in place of the file's: device=cuda recompute=true …")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N≥1", min=1, help="Timed steps of every loop; the median counts.")] = 10,
) -> None:
    """Measure training: tokens per second, MFU and memory against a plain PyTorch loop over the same model, memory against length.

    reelflow bench train examples/mini.yaml
    """
    from reelflow.training.config import TrainConfig

    settings, screen = TrainConfig.load(config, overrides), Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("starting", 0.0)
        from reelflow.evaluation.training import run, table

        found = run(settings, steps, progress=report)
    if first():
        screen.result(found, table(found))


@takes(options=OnModel)
def bench_svd(
    options: OnModel,
    frames: Annotated[int | None, typer.Option(metavar="N≥1", min=1, help="Of the clip. \\[default: the trained length]")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels, multiples of 64. \\[default: the model's own]")] = None,
    steps: Annotated[int, typer.Option(metavar="N≥1", min=1, help="Euler steps.")] = 25,
    repeats: Annotated[int, typer.Option(metavar="N≥1", min=1, help="Timings, after one to warm up; the quickest counts.")] = 1,
    against_diffusers: Annotated[
        bool, typer.Option("--against-diffusers", help="Also time diffusers' pipeline: same weights, picture, seed, steps, taking turns.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Ours with compiled regions, and on a GPU recorded steps: minutes before the first timing.")
    ] = False,
) -> None:
    """Measure Stable Video Diffusion: seconds of encoding, of a step, of decoding, their arithmetic, the device's share of it, memory.

    reelflow bench svd --model svd-xt --against-diffusers
    """
    job = Job(options)
    with job.running():
        from reelflow.cli.job import size as pixels
        from reelflow.evaluation.svd import run, table

        asked = frames, pixels(size), steps, repeats, against_diffusers, compile_
        found = run(options.model, options.device, options.precision, *asked, job.report)
        words = table(found)
    job.screen.result(found, words)


@evaluate.command()
@takes(options=Solving)
def toybox(
    options: Solving,
    count: Annotated[
        int, typer.Option(metavar="N≥1", min=1, help="Clips from text (svd: pictures); the other tasks take a quarter of it, at least 4.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="0…2^63−1", help="Of the clips; the scenes asked for stay the same.")] = 0,
    guidance: Annotated[float | None, typer.Option(metavar="W≥0", help="Weight of the prompt. \\[default: the model's own]")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="0…1", help="Of flows: deviation of the noise. \\[default: the model's own]")
    ] = None,
    extended: Annotated[int, typer.Option(metavar="N≥34", help="Frames of the clips that are extended, from 33.")] = 65,
    edited: Annotated[int, typer.Option(metavar="5…33", help="Frames of the clips that are edited.")] = 33,
    only: Annotated[
        list[str] | None, typer.Option(metavar="MEASURE", help="Measure this alone, as in --only one_thing; several times: these.")
    ] = None,
) -> None:
    """Generate toybox scenes and measure how often colour, shape and motion are those of the prompt; of a Stable Video Diffusion, animate
    pictures and measure what is kept, and how motion follows --motion and --fps.

    reelflow evaluate toybox --model mini --count 64
    """
    job = Job(options)
    with job.running():
        from reelflow.evaluation.toybox import run

        found = run(
            options.model, options.device, options.precision, count=count, seed=seed, sampler=options.sampler, tolerance=options.tolerance,
            guidance=guidance, temperature=temperature, extended=extended, edited=edited, only=only or (), progress=job.report,
        )  # fmt: skip
    job.screen.table(found, f"toybox: {options.model}", ("measure", "value"), [(key, _flat(value)) for key, value in found.items()])


def _flat(values: Any) -> str:
    """Nested values in one table cell: a line per entry."""
    if isinstance(values, dict):
        return "\n".join(f"{key}: {_flat(value) if not isinstance(value, dict) else value}" for key, value in values.items())
    if isinstance(values, list):
        return ", ".join(map(str, values)) or "none"
    return f"{values:.4g}" if isinstance(values, float) else str(values)


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command(cls=handing_on(train=bench_train, svd=bench_svd))(bench)

"""doctor, bench, evaluate: what this machine can run, how fast, and how good a model is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reelflow.cli.job import Job
from reelflow.cli.options import Printing, Solving, takes
from reelflow.cli.screen import Screen

evaluate = typer.Typer(no_args_is_help=True)


@takes(options=Printing)
def doctor(options: Printing) -> None:
    """Say what this machine can run: processor, memory, GPU, libraries, encoders, models, and what would be chosen."""
    from reelflow.evaluation.doctor import examine

    found = examine()
    rows = [(topic, _flat(values)) for topic, values in found.items()]
    Screen(options.json, options.quiet).table(found, "reelflow doctor", ("topic", "found"), rows)


@takes(options=Solving)
def bench(options: Solving) -> None:
    """Measure sampling: tokens per second, passes, seconds to the first frame, peak memory.

    reelflow bench --model mini --json
    """
    from reelflow.evaluation.bench import run

    job = Job(options)
    with job.running():
        found = run(options.model, options.device, sampler=options.sampler, tolerance=options.tolerance, progress=job.report)
    job.screen.table(found, f"bench: {options.model}", ("measure", "value"), [(key, _flat(value)) for key, value in found.items()])


@evaluate.command()
@takes(options=Solving)
def toybox(
    options: Solving,
    count: Annotated[
        int, typer.Option(metavar="N≥1", min=1, help="Clips from text; the other tasks take a quarter of it, at least 4.")
    ] = 64,
    seed: Annotated[int, typer.Option(metavar="0…2^63−1", help="Of the clips; the scenes asked for stay the same.")] = 0,
) -> None:
    """Generate toybox scenes and measure how often colour, shape and motion are those of the prompt.

    reelflow evaluate toybox --model mini --count 64
    """
    from reelflow.evaluation.toybox import run

    job = Job(options)
    with job.running():
        found = run(
            options.model, options.device, count=count, seed=seed, sampler=options.sampler, tolerance=options.tolerance, progress=job.report
        )
    job.screen.table(found, f"toybox: {options.model}", ("measure", "value"), [(key, _flat(value)) for key, value in found.items()])


def _flat(values: Any) -> str:
    """Nested values in one table cell: a line per entry."""
    if isinstance(values, dict):
        return "\n".join(f"{key}: {_flat(value) if not isinstance(value, dict) else value}" for key, value in values.items())
    if isinstance(values, list):
        return ", ".join(map(str, values)) or "none"
    return f"{values:.4g}" if isinstance(values, float) else str(values)


def add_to(app: typer.Typer) -> None:
    for command in (doctor, bench):
        app.command()(command)

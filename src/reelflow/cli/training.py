"""train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from reelflow.cli.inner import handing_on
from reelflow.cli.job import check_writable
from reelflow.cli.options import OUTPUT, Printing, takes
from reelflow.cli.prepare import prepare
from reelflow.cli.screen import Screen, tell


@takes(options=Printing)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, on what, and how; see examples/.")],
    options: Printing,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings in place of the file's; dots reach inside: flow.width=256")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", rich_help_panel=OUTPUT, help="For checkpoints, log and model. \\[default: runs/NAME of the file]"),
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Train no further: write the model of the folder's latest checkpoint.")
    ] = False,
) -> None:
    """Train a model, or adapters of one. A folder with a checkpoint is resumed where it stopped, also after it was killed.

    reelflow train examples/mini.yaml lr=1e-4 --folder runs/first

    Encode the clips once, before: reelflow train prepare CONFIG.yaml (see its --help).

    Several GPUs or machines: torchrun --nproc-per-node 8 -m reelflow train …
    """
    from reelflow.training.config import load

    settings = load(config, overrides)
    folder = folder or Path("runs") / config.stem
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    check_writable(existing / folder.name)
    from reelflow.training.run import run

    rows: list[dict[str, Any]] = []
    first = os.environ.get("RANK", "0") == "0"  # torchrun starts this command once per process; one of them talks
    screen = Screen(options.json, options.quiet or not first)
    with _bar(screen, settings.steps) as bar:
        (task,) = bar.task_ids

        def on_log(row: dict[str, Any]) -> None:
            rows[:] = [row]
            bar.update(task, completed=row["step"], description=_words(row))
            if not screen.live and not options.quiet:
                tell(f"step {row['step']}/{settings.steps} · {_words(row)}")

        try:
            model = run(settings, folder, on_log, export)
        except KeyboardInterrupt:
            saved = any((folder / "checkpoints").glob("step-*"))
            left = f"{folder} holds the last checkpoint; the same command goes on from there" if saved else "no checkpoint was written yet"
            raise KeyboardInterrupt(left) from None
    last = rows[0] if rows else {}
    done = f" · {_words(last)}" if last else ", as they stand" if export else ", all of them done before"
    if first:
        values = {"model": str(model), "folder": str(folder), "steps": settings.steps, **last}
        screen.result(values, f"{model}: {'averaged weights' if export else f'{settings.steps} steps'}{done}")


def _bar(screen: Screen, steps: int) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    bar = Progress(*columns, console=screen.console, disable=not screen.live)
    bar.add_task("starting", total=steps)
    return bar


def _words(row: dict[str, Any]) -> str:
    left = int(row.get("seconds_left", 0))
    bits = f"{row['bits_per_dim']:.3f} bits/dim · " if "bits_per_dim" in row else ""
    return (
        f"loss {row['loss']:.4f} · {bits}gradient {row['grad_norm']:.3g} · "
        f"{row['tokens_per_second']} tokens/s · {row['mfu']:.0%} MFU · {row['data_wait']:.0%} data · "
        f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02} left"
    )


def add_to(app: typer.Typer) -> None:
    app.command(cls=handing_on(prepare=prepare))(train)

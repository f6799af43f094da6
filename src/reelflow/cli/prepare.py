"""train prepare."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from reelflow.cli.job import check_writable
from reelflow.cli.options import Printing, takes
from reelflow.cli.ranks import first
from reelflow.cli.screen import Screen, tell

EVERY = 5.0
"""Seconds between lines of progress where there is no terminal."""


@takes(options=Printing)
def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A training configuration with data and latents; see examples/.")],
    options: Printing,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings in place of the file's: data.folder=clips …")
    ] = None,
) -> None:
    """Decode and encode the clips of a configuration once, for training to read: latents, captions, text states.

    reelflow train prepare examples/folder.yaml data.folder=clips

    Stopped at any time, also killed, the same command goes on. Several processes share the work:
    torchrun --nproc-per-node 8 -m reelflow train prepare …
    """
    from reelflow.training.config import load

    settings = load(config, overrides)
    if settings.latents is not None:
        existing = next(parent for parent in (settings.latents, *settings.latents.absolute().parents) if parent.exists())
        check_writable(existing / settings.latents.name)
    from reelflow.adapters.torchrun import own_device
    from reelflow.training.latents import Preparation

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    screen = Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("preparing", 0.0)
        work = Preparation(settings, own_device(settings.device), rank, ranks)
        said = time.monotonic()

        def on_row(row: dict[str, Any]) -> None:
            nonlocal said
            report("preparing", row["done"])
            if first() and not screen.live and not options.quiet and time.monotonic() - said > EVERY:
                said = time.monotonic()
                tell(_words(row))

        try:
            found = work.run(on_row)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{work.folder} holds the shards that are done; the same command goes on from there") from None
    if first():
        failed = f" · {found['failed']} of {found['failed'] + found['clips']} left out, see {work.failures.path}" if found["failed"] else ""
        screen.result({"latents": str(work.folder), **found}, f"{work.folder}: {found['clips']} clips in {found['shards']} shards{failed}")


def _words(row: dict[str, Any]) -> str:
    words = f"{row['done']:.0%} · {row['clips']} clips · {row['failed']} left out"
    left = row["seconds_left"]
    return words if left is None else f"{words} · {left // 3600}:{left % 3600 // 60:02}:{left % 60:02} left"

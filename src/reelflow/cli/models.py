"""models: list, info, convert, fetch, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from reelflow.cli.job import check_writable
from reelflow.cli.options import Printing, takes
from reelflow.cli.screen import Screen, tell

app = typer.Typer(no_args_is_help=True)


@app.command("list")
@takes(options=Printing)
def list_models(options: Printing) -> None:
    """Models that ship in the package."""
    from reelflow.adapters.hub import packaged
    from reelflow.evaluation.card import describe

    cards = [describe(name) for name in packaged()]
    rows = [
        (card["name"], card["family"], f"{card['size']} px × {card['frames']}", ", ".join(card["tasks"]), card["disk"], card["licence"])
        for card in cards
    ]
    if not cards and not options.json:
        tell("no model ships in this package; name a folder or a Hugging Face id with --model")
        return
    Screen(options.json).table(cards, "packaged models", ("name", "family", "frames of", "tasks", "disk", "licence"), rows)


@app.command()
@takes(options=Printing)
def info(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER|HF-ID", help="A packaged name, a model folder, or a Hugging Face id.")],
    options: Printing,
) -> None:
    """Configuration, parameters of each block, size on disk, tasks, training and licence of a model."""
    from reelflow.evaluation.card import describe

    card = describe(model)
    rows: list[tuple[object, ...]] = [(key, card[key]) for key in ("name", "family", "revision", "licence", "disk")]
    rows += [("clip", f"{card['frames']} frames of {card['size']} px at {card['fps']:g} per second"), ("tasks", ", ".join(card["tasks"]))]
    rows += [(f"parameters: {part}", f"{count:,}") for part, count in card["parameters"].items()]
    rows += [(f"flow: {key}", value) for key, value in card["flow"].items()]
    screen = Screen(options.json)
    screen.table(card, model, ("", ""), rows)
    if card["readme"] and not options.json:
        print(card["readme"])


@app.command()
@takes(options=Printing)
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A checkpoint of the reference implementation.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The model folder to make; must not exist.")],
    options: Printing,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="YAML", help="Its configuration; not needed for the published files by their names.")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER|FILE", help="VAE to copy in, a diffusers folder or Wan2.2_VAE.pth. \\[default: fetched later]"),
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="T5 and its tokenizer to copy in. \\[default: fetched later]")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Precision to store. \\[default: the checkpoint's]")
    ] = None,
) -> None:
    """Turn a reference checkpoint into a model folder, shard by shard; every tensor is accounted for.

    reelflow models convert starflow-v_7B_t2v_caus_480p_v3.pth -o starflow-v
    """
    import torch

    from reelflow.adapters.convert import convert as run
    from reelflow.adapters.hub import licence_notice

    check_writable(output)
    screen = Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("reading", 0.0)
        model = run(
            checkpoint, config, output, vae=vae, text_encoder=text_encoder, dtype=getattr(torch, dtype) if dtype else None,
            progress=lambda done, total: report("converting", done / total),
        )  # fmt: skip
    notice = licence_notice(checkpoint.name) or licence_notice(model.licence)
    if notice:
        tell(f"note: {notice}")
    screen.result(
        {"folder": str(output), "model": model.name, "licence": model.licence}, f"{output}: {model.name}, licence {model.licence}"
    )


@app.command()
@takes(options=Printing)
def merge(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER|HF-ID", help="The model that the LoRA was trained on.")],
    lora: Annotated[list[str], typer.Argument(metavar="LORA[:WEIGHT]…", help="Its file, and how much of it (1); several add up.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The model folder to make; must not exist.")],
    options: Printing,
) -> None:
    """Make a model folder with LoRAs added to the weights.

    reelflow models merge mini heart.safetensors:0.8 -o mini-heart
    """
    from reelflow.adapters.hub import resolve
    from reelflow.adapters.lora import Lora, parse
    from reelflow.adapters.lora import merge as run

    check_writable(output)
    loras = [(Lora.open(file), weight) for file, weight in map(parse, lora)]
    screen = Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("merging", 0.0)
        made = run(resolve(model), loras, output, lambda done, total: report("merging", done / total))
    screen.result({"folder": str(output), "model": made.name}, f"{output}: {made.name}")


@app.command()
@takes(options=Printing)
def fetch(
    model: Annotated[str, typer.Argument(metavar="HF-ID", help="Hugging Face id org/name, or org/name:subfolder.")],
    options: Printing,
) -> None:
    """Download a model from Hugging Face into its cache: configurations, tokenizers and safetensors only."""
    from reelflow.adapters.hub import fetch as run
    from reelflow.adapters.hub import licence_notice

    screen = Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("fetching", 0.0)
        folder = run(model)
    if notice := licence_notice(model):
        tell(f"note: {notice}")
    screen.result({"model": model, "folder": str(folder)}, f"{model}: {folder}")


@app.command()
@takes(options=Printing)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Golden vectors: inputs and the reference's outputs.")],
    options: Printing,
) -> int:
    """Hold the code against golden vectors of the reference. Exit code 0: all within bounds, 1: not."""
    from reelflow.evaluation.golden import verify as run

    screen = Screen(options.json, options.quiet)
    with screen.progress() as report:
        report("verifying", 0.0)
        rows = run(folder)
    values = [{"name": row.name, "error": row.error, "bound": row.bound, "passed": row.passed} for row in rows]
    table: list[tuple[object, ...]] = [(r.name, f"{r.error:.3g}", f"{r.bound:.3g}", "pass" if r.passed else "FAIL") for r in rows]
    screen.table(values, str(folder), ("name", "max error", "bound", ""), table)
    return 0 if all(row.passed for row in rows) else 1

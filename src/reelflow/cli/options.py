"""The options that commands share, each declared once: fields of a dataclass that become options of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, Literal, get_type_hints

import typer

from reelflow.adapters.precision import Precision

MACHINE, SAMPLING, OUTPUT = "Model and machine", "Sampling", "Output"
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="0…0.1",
        rich_help_panel=SAMPLING,
        help="jacobi: a token is settled when a pass moves it by no more than this, in units of its own standard deviation; "
        "0: exact. 1e-3 where nothing is said (3e-2 below float32; 1e-6 to decode).",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Printing:
    """What is printed."""

    json: Annotated[
        bool, typer.Option("--json", rich_help_panel=OUTPUT, help="One line of JSON on stdout instead of words; everything else on stderr.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="No progress; results and notes only.")] = False


@dataclass(frozen=True, kw_only=True)
class OnModel(Printing):
    """Which model, and where it runs."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME|FOLDER|HF-ID|FILE", rich_help_panel=MACHINE,
            help="Packaged name (see: reelflow models list), model folder, Hugging Face id org/name (downloaded once), or the file of a "
            "published checkpoint under its own name (others: reelflow models convert).",
        ),
    ] = "mini"  # fmt: skip
    device: Annotated[
        str | None,
        typer.Option("--device", rich_help_panel=MACHINE, help="cpu, cuda, cuda:1 … \\[default: cuda where there is a GPU, else cpu]"),
    ] = None
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision", rich_help_panel=MACHINE,
            help="Of the transformer layers. auto: bfloat16 for large flows where the device is fast in it, else float32; mini is always "
            "float32. int8, int4 (weights), fp8 (weights and activations): smaller, less exact; flows only, with reelflow\\[quantize].",
        ),
    ] = "auto"  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Solving(OnModel):
    """How the flow is inverted."""

    sampler: Annotated[
        Literal["jacobi", "sequential"],
        typer.Option("--sampler", rich_help_panel=SAMPLING, help="jacobi: many tokens a pass, to the tolerance. sequential: one by one."),
    ] = "jacobi"
    tolerance: Tolerance = None


@dataclass(frozen=True, kw_only=True)
class Writing(Solving):
    """A clip is written."""

    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT,
            help=".mp4, .webm, .gif, .png (one frame), or a folder (no extension) for numbered PNGs; an existing file of that name is "
            "replaced. \\[default: a new name from prompt and seed, .mp4, in the current folder]",
        ),
    ] = None  # fmt: skip
    metadata: Annotated[
        bool,
        typer.Option(" /--no-metadata", show_default=False, rich_help_panel=OUTPUT, help="Do not write into the file how it was made."),
    ] = True


@dataclass(frozen=True, kw_only=True)
class Decoding(Writing):
    """Noise is turned back into what it came from, by default as exactly as float32 holds it."""

    tolerance: Tolerance = 1e-6


@dataclass(frozen=True, kw_only=True)
class Making(Writing):
    """A clip is sampled."""

    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", rich_help_panel=SAMPLING, metavar="0…2^63−1",
            help="The same seed gives the same clip on every device. \\[default: random, printed and stored in the file]",
        ),
    ] = None  # fmt: skip
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", rich_help_panel=SAMPLING, metavar="W≥0",
            help="Weight of the prompt; 0 switches it off and halves the work of the deep block. svd: of the picture, in the last frame; 1 "
            "switches it off. \\[default: the model's own]",
        ),
    ] = None  # fmt: skip
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", rich_help_panel=SAMPLING, metavar="0…1",
            help="Standard deviation of the clip's noise: below 1 the likelier clips, less various. \\[default: the model's own]",
        ),
    ] = None  # fmt: skip
    denoise: Annotated[
        bool,
        typer.Option(
            " /--no-denoise",
            show_default=False,
            rich_help_panel=SAMPLING,
            help="Leave the noise that the model was trained with in the clip.",
        ),
    ] = True
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget", metavar="24GB", rich_help_panel=MACHINE,
            help="Of the device (MB, GB, MiB, GiB). The best precision and placement that keep within it are chosen before anything is "
            "made, printed, and stored in the file.",
        ),
    ] = None  # fmt: skip
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE[:WEIGHT]", rich_help_panel=MACHINE,
            help="Add what a LoRA learned, times the weight (1). May be given several times.",
        ),
    ] = None  # fmt: skip
    ring: Annotated[
        bool,
        typer.Option(
            "--ring", rich_help_panel=SAMPLING,
            help="Beyond the trained length: keep what was read of the last frames instead of reading it again. Faster, an approximation.",
        ),
    ] = False  # fmt: skip
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", rich_help_panel=SAMPLING,
            help="Check the sample: one parallel pass over it must give its noise back. The residual is printed and stored.",
        ),
    ] = False  # fmt: skip


SVD = "Sampling with svd"
SHORTER = "Less work with svd, and another clip"


@dataclass(frozen=True, kw_only=True)
class Diffusing:
    """How Stable Video Diffusion samples; other families refuse what is given here."""

    motion: Annotated[
        int | None, typer.Option("--motion", metavar="1…255", rich_help_panel=SVD, help="How much moves. \\[default: 127]")
    ] = None
    fps: Annotated[
        int | None,
        typer.Option(
            "--fps", metavar="3…30", rich_help_panel=SVD,
            help="Frames per second the motion is meant for: fewer, more happens between two frames. \\[default: 7; of a video, its own]",
        ),
    ] = None  # fmt: skip
    playback: Annotated[
        float | None,
        typer.Option("--playback", metavar="0.1…240", rich_help_panel=SVD, help="Frames per second of the file. \\[default: as --fps]"),
    ] = None
    noise_aug: Annotated[
        float | None,
        typer.Option(
            "--noise-aug", metavar="0…1", rich_help_panel=SVD,
            help="Standard deviation of the noise on the picture (black −1, white 1): more lets the clip leave it. \\[default: 0.02]",
        ),
    ] = None  # fmt: skip
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="1…1000", rich_help_panel=SVD, help="Euler steps; time grows with them. \\[default: 25]"),
    ] = None
    first_guidance: Annotated[
        float | None,
        typer.Option(
            "--first-guidance", metavar="W≥0", rich_help_panel=SVD,
            help="Guidance in the first frame; from there it rises evenly to --guidance. \\[default: 1]",
        ),
    ] = None  # fmt: skip
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WxH", rich_help_panel=SVD,
            help="Pixels, multiples of 64; the picture is cut to it, never squashed. \\[default: 1024x576, upright 576x1024]",
        ),
    ] = None  # fmt: skip
    reference: Annotated[
        Literal["stability", "diffusers"] | None,
        typer.Option(
            "--reference", rich_help_panel=SVD,
            help="Whose numbers: stability, as the weights were trained, or diffusers, whose norms differ. \\[default: stability]",
        ),
    ] = None  # fmt: skip
    schedule: Annotated[
        Literal["karras", "ays"] | None,
        typer.Option(
            "--schedule", rich_help_panel=SHORTER,
            help="Noise levels of the steps: the model's own, or those of Align Your Steps, for --steps 10. \\[default: karras]",
        ),
    ] = None  # fmt: skip
    guided: Annotated[
        str | None,
        typer.Option(
            "--guided", metavar="LOW-HIGH", rich_help_panel=SHORTER,
            help="Noise levels at which guidance applies, as 1-100; the other steps are half the work. \\[default: all, 0-700]",
        ),
    ] = None  # fmt: skip
    reuse: Annotated[
        int | None,
        typer.Option(
            "--reuse", metavar="1…10", rich_help_panel=SHORTER,
            help="Compute the inner levels of the network in every n-th step only. \\[default: 1, in each]",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Painting(Diffusing):
    """A first frame is painted from the prompt, then set in motion."""

    first: Annotated[
        str | None,
        typer.Option(
            "--first", metavar="NAME|FOLDER|HF-ID", rich_help_panel=SVD,
            help="Model of the first frame: a STARFlow, or a text-to-image model of diffusers. \\[default: mini]",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a new clip is."""

    seconds: Annotated[
        float | None,
        typer.Option("--seconds", metavar="S>0", help="Length in seconds, to the nearest the model makes. \\[default: the trained one]"),
    ] = None
    frames: Annotated[
        int | None,
        typer.Option("--frames", metavar="N", help="Length in frames instead: 1 + 4k (1, 5, 9 …) with STARFlow-V, any with svd."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a given video is used."""

    start: Annotated[float, typer.Option("--start", metavar="S≥0", help="Seconds of the video to leave out at its beginning.")] = 0.0
    max_frames: Annotated[
        int | None, typer.Option("--max-frames", metavar="N≥1", help="Read at most so many of its frames. \\[default: all]")
    ] = None


def takes(**kinds: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the fields of dataclasses as options: `@takes(options=Making)` calls it with `options=Making(…)`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in kinds]
        added = []
        for kind in kinds.values():
            hints = get_type_hints(kind, include_extras=True)
            added += [
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]) for f in fields(kind)
            ]

        @wraps(function)
        def command(**given: Any) -> Any:
            made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in kinds.items()}
            return function(**given, **made)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate

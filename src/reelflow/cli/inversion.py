"""score, encode, decode: commands that run the flow from video to noise, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reelflow.cli.clips import OptionalPrompt, Video
from reelflow.cli.job import ClipJob, Job, check_clip_output, check_file, sampling
from reelflow.cli.options import OUTPUT, Decoding, OnModel, Part, Solving, takes
from reelflow.cli.ranks import first

NoiseSeed = Annotated[int, typer.Option("--seed", metavar="0…2^63−1", help="Of the data noise that is added, as in training.")]


@takes(part=Part, options=Solving)
def score(
    video: Video,
    part: Part,
    options: Solving,
    prompt: OptionalPrompt = "",
    seed: NoiseSeed = 0,
    heat_map: Annotated[
        str | None,
        typer.Option("--map", metavar="FILE", rich_help_panel=OUTPUT, help="Also write where and when the video is improbable, beside it."),
    ] = None,
) -> None:
    """Tell how probable a video is: exact log-probability in nats, bits per dimension, and nats per latent frame.

    One pass forward: --sampler and --tolerance change nothing here.

    reelflow score ball.mp4 "a red ball moves right" --map surprise.mp4
    """
    job = Job(options)
    with job.running():
        from reelflow.pipelines.base import new_seed

        new_seed(seed)
        sampling(options)
        if heat_map:
            check_clip_output(heat_map)
        source = job.read(video, part)
        pipe = job.load()
        found = pipe.score(source, prompt, seed=seed, progress=job.report)
        if heat_map and first():
            job.report("writing", 0.0)
            found.heat_map().save(heat_map)
    values = found.to_dict() | {"file": video, "prompt": prompt, "model": pipe.about.name, "map_file": heat_map, "took": job.took}
    words = (
        f"log p = {found.log_prob:.2f} nats · {found.bits_per_dim:.4f} bits/dim of {found.dims} dims · "
        f"{len(found.clip)} frames, noise σ = {found.noise_std:g}, seed {seed} · took {job.took:.1f} s\n"
        f"nats per latent frame: {' '.join(f'{nats:.1f}' for nats in found.per_frame)}"
    )
    job.screen.result(values, words + (f"\nmap: {heat_map}" if heat_map else ""))


@takes(part=Part, options=OnModel)
def encode(
    video: Video,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.safetensors", rich_help_panel=OUTPUT, help="Where the noise goes.")
    ],
    part: Part,
    options: OnModel,
    prompt: OptionalPrompt = "",
    seed: NoiseSeed = 0,
) -> None:
    """Turn a video into the flow's noise, exactly: `decode` gives the same latents back.

    reelflow encode ball.mp4 -o ball.safetensors
    """
    job = Job(options)
    with job.running():
        from reelflow.pipelines.base import new_seed

        new_seed(seed)
        check_file(output, ".safetensors")
        source = job.read(video, part)
        found = job.load().encode(source, prompt, seed=seed, progress=job.report)
        if first():
            found.save(output)
    values = {"file": output, "shape": list(found.z.shape), "fps": found.fps, "seed": seed, "model": found.model, "took": job.took}
    shape = " × ".join(map(str, found.z.shape))
    job.screen.result(values, f"{output}: noise of {shape} · seed {seed} · took {job.took:.1f} s")


@takes(options=Decoding)
def decode(
    encoding: Annotated[str, typer.Argument(metavar="FILE.safetensors", help="What `encode` wrote.")],
    options: Decoding,
) -> None:
    """Turn noise back into the video it came from.

    reelflow decode ball.safetensors -o again.mp4
    """
    job = ClipJob(options)
    with job.running():
        from reelflow.pipelines import Encoding

        found = Encoding.open(encoding)
        job.settle(f"decoded {Path(encoding).stem}", found.seed, still=len(found.z) == 1)
        clip = job.load().decode(found, sampling=job.sampling, progress=job.report)
        job.write(clip)
    job.tell(clip)


def add_to(app: typer.Typer) -> None:
    for command in (score, encode, decode):
        app.command()(command)

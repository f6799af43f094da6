"""How well a model knows toybox: its clips, read back by the detector, against what was asked for.

    reelflow evaluate toybox --model mini --count 64

Every prompt and seed is fixed, so a number is a number of the model. What is asked:

    codec                             true clips through the codec and back: what no flow over it can surpass
    one_thing, held_out, two_things   text → video; held_out: colour–shape pairs that training never showed
    animate                           first frame + caption → video: first frame against the codec's own, thing there in the last
    edit                              clip + instruction → the changed scene with the motion kept
    extend                            clip + caption → a longer clip: colour and shape in its last 33 frames, there in the last; and
                                      whether it still moves, or still does not, as it was asked to
    likelihood                        bits per dimension on train-like and on held-out clips; impossible twins scored lower
    denoiser                          PSNR of noised latents, decoded: as they are, Tweedie step, learned denoiser

What is asked of a Stable Video Diffusion, `toybox_svd` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from reelflow.adapters.precision import Precision
from reelflow.clip import Clip
from reelflow.data.scene import DIRECTIONS, Scene, Split, sample_scene
from reelflow.data.toybox import CLIP, canonical, edit_pair, impossible_twin, render
from reelflow.denoise import denoise, tweedie
from reelflow.evaluation import toybox_svd
from reelflow.evaluation.detect import Detection, apart, detect, matches
from reelflow.evaluation.toybox_svd import psnr
from reelflow.likelihood import add_noise
from reelflow.pipelines import Pipeline, load
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.sampling import Schedule

SEED = 20_000
"""Of the scenes asked for; training uses others."""
NEAR = 8.0
"""Pixels: half a latent place, less than the radius of a small thing."""
STIRS = 12.0
"""Pixels across which a thing is to be seen in 33 frames to count as moving (`validate` says how well that tells it)."""
ROWS: dict[str, tuple[Split, int]] = {"one_thing": ("train", 1), "held_out": ("held_out", 1), "two_things": ("train", 2)}
"""Of text → video: which scenes, of how many things."""
KINDS = {"direction": set(DIRECTIONS)} | {motion: {motion} for motion in ("stays still", "bounces", "circles")}
"""Of motions, each measured by itself."""
Progress = Callable[[str, float], None]


def run(
    model: str = "mini", device: str | None = None, precision: Precision = "auto", count: int = 64, seed: int = 0, batch: int = 8,
    sampler: str = "jacobi", tolerance: float | None = None, guidance: float | None = None, temperature: float | None = None,
    extended: int = 65, edited: int = CLIP, only: Sequence[str] = (), progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Rates (0 … 1), bits per dimension and decibels, by task.

    Args:
        count: clips per text → video row, 1 …; the other tasks take a quarter of it, at least 4.
        seed: of the clips, 0 …; the scenes asked for stay the same.
        extended: frames of the clips of `extend`, above 33.
        edited: frames of the clips of `edit`, 5 … 33.
        only: names of what is measured, see the top of the file; by default all.
    """
    if count < 1:
        raise ValueError(f"count {count} is not usable; give at least 1 clip")
    if extended <= CLIP:
        raise ValueError(f"extended {extended} is not usable; give more than the {CLIP} frames that are continued")
    if not 5 <= edited <= CLIP:
        raise ValueError(f"edited {edited} is not usable; give 5 to {CLIP} frames")
    others: dict[str, Callable[[StarFlowPipeline, int, Sampling], dict[str, float]]] = {
        "codec": codec, "animate": animate, "edit": partial(edit, frames=edited), "extend": partial(extend, frames=extended),
        "likelihood": likelihood, "denoiser": denoiser,
    }  # fmt: skip
    pipe: Pipeline = load(model, device, precision)
    known = toybox_svd.MEASURES if isinstance(pipe, SvdPipeline) else (*ROWS, *others)
    if unknown := set(only) - set(known):
        raise ValueError(f"{', '.join(sorted(unknown))}: not measured of {pipe.about.name}; there are {', '.join(known)}")
    if isinstance(pipe, SvdPipeline):
        return toybox_svd.run(pipe, count, seed, batch, Diffusion(guidance=guidance), only, progress)
    assert isinstance(pipe, StarFlowPipeline)
    sampling = Sampling(guidance, Schedule(sampler, tolerance), temperature=temperature)
    few = max(4, count // 4)
    found: dict[str, Any] = {"model": pipe.about.name, "revision": pipe.about.revision, "count": count, "count_other_tasks": few}
    for name, (split, things) in ROWS.items():
        if not only or name in only:
            found[name] = generate(pipe, scenes(count, split, things), seed, batch, sampling, partial(progress, name))
    for name, measure in others.items():
        progress(name, 0.0)
        if (not only or name in only) and (name not in ("animate", "edit", "extend") or name in pipe.about.tasks):
            found[name] = measure(pipe, few, sampling)
    return found


def scenes(count: int, split: Split, things: int) -> list[Scene]:
    """Scenes without a wall: what a prompt can say."""
    drawn = (sample_scene(SEED, index, split=split, things=things) for index in range(100 * count))
    return [scene for scene, _ in zip((s for s in drawn if s.wall is None), range(count), strict=False)]


def rates(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    return {key: round(sum(result[key] for result in results) / len(results), 4) for key in results[0]}


def generate(
    pipe: StarFlowPipeline, wanted: list[Scene], seed: int, batch: int, sampling: Sampling, progress: Callable[[float], None]
) -> dict[str, float]:
    """Shares of clips whose colour, shape, size, motion, background, and all but the size, are as asked; and of the motions alone, of
    clips where every thing is asked for one of a kind (`KINDS`), and of two things of which at least one is ("with bounces").
    """
    results = []
    for start in range(0, len(wanted), batch):
        some = wanted[start : start + batch]
        clips = pipe.generate_batch([canonical(scene) for scene in some], [seed + start + i for i in range(len(some))], sampling=sampling)
        results += [matches(detect(clip.frames, len(scene.things)), scene) for clip, scene in zip(clips, some, strict=True)]
        progress(len(results) / len(wanted))
    found = rates(results)
    asked = [{thing.motion for thing in scene.things} for scene in wanted]
    pairs = [motions if len(scene.things) == 2 else set[str]() for motions, scene in zip(asked, wanted, strict=True)]
    for kind, motions in KINDS.items():
        for name, counts in ((kind, [own <= motions for own in asked]), (f"with {kind}", [bool(own & motions) for own in pairs])):
            right = [result["motion"] for result, one in zip(results, counts, strict=True) if one]
            found |= {name: round(sum(right) / len(right), 4)} if right else {}
    return found


def shown(scene: Scene, frames: int = CLIP) -> Clip:
    return Clip(render([scene], frames)[0].numpy(), 16)


def codec(pipe: StarFlowPipeline, count: int, sampling: Sampling) -> dict[str, float]:
    """Of true clips after encoding and decoding, and their PSNR."""
    results, noise = [], []
    for scene in scenes(count, "train", 1):
        clip = shown(scene).frames
        again = pipe.codec.decode(pipe.codec.encode(torch.from_numpy(clip)[None]))[0].numpy()
        results.append(matches(detect(again, 1), scene))
        noise.append(psnr(again, clip))
    return rates(results) | {"psnr": round(float(np.mean(noise)), 2)}


def animate(pipe: StarFlowPipeline, count: int, sampling: Sampling) -> dict[str, float]:
    results, first, codec = [], [], []
    for index, scene in enumerate(scenes(count, "train", 1)):
        picture = shown(scene, 1)
        clip = pipe.animate(picture, canonical(scene), seed=index, sampling=sampling)
        seen = detect(clip.frames, 1)
        results.append(matches(seen, scene) | there(seen))
        first.append(psnr(clip.frames[0], picture.frames[0]))
        codec.append(psnr(pipe.codec.decode(pipe.codec.encode(torch.from_numpy(picture.frames)[None]))[0, 0].numpy(), picture.frames[0]))
    return rates(results) | {"first_frame_psnr": round(float(np.mean(first)), 2), "codec_psnr": round(float(np.mean(codec)), 2)}


def edit(pipe: StarFlowPipeline, count: int, sampling: Sampling, frames: int = CLIP) -> dict[str, float]:
    """`motion`: the thing is where it should be, to `NEAR` pixels on average; `all` has the size too where that was to change."""
    results = []
    pairs = (pair for pair in (edit_pair(SEED, index) for index in range(50 * count)) if len(pair[0].things) == 1 and pair[0].wall is None)
    for index, (before, after, words) in zip(range(count), pairs, strict=False):
        made = pipe.edit(shown(before, frames), words, seed=index, sampling=sampling)
        true, seen = detect(shown(after, len(made)).frames, 1), detect(made.frames, 1)
        resized = before.things[0].size != after.things[0].size
        named = [replace(one, motion=after.things[0].motion if apart(one, true[0]) <= NEAR else "elsewhere") for one in seen]
        results.append(matches(named, after, resized))
    return rates(results)


def there(seen: list[Detection]) -> dict[str, bool]:
    """Whether something is in full view in the last frame."""
    return {"there": any(bool(one.present[-1]) for one in seen)}


def goes_on(seen: list[Detection], scene: Scene) -> dict[str, bool]:
    """Whether what was asked to move still does, whichever way, and what was asked to stay still does not."""
    moves = any(float(np.ptp(one.track, axis=0).max()) > STIRS for one in seen)
    return {"goes on": bool(seen) and moves == (scene.things[0].motion != "stays still")}


def extend(pipe: StarFlowPipeline, count: int, sampling: Sampling, frames: int = 65) -> dict[str, float]:
    results = []
    for index, scene in enumerate(scenes(count, "train", 1)):
        clip = pipe.extend(shown(scene), canonical(scene), seconds=frames / 16, seed=index, sampling=sampling)
        seen = detect(clip.frames[-CLIP:], 1)
        kept = {key: held for key, held in matches(seen, scene).items() if key in ("colour", "shape", "background")} | there(seen)
        results.append(kept | {"all": all(kept.values())} | goes_on(seen, scene))
    return rates(results)


def likelihood(pipe: StarFlowPipeline, count: int, sampling: Sampling) -> dict[str, float]:
    """Bits per dimension with the true caption, and how often an impossible twin is scored lower than its possible one."""

    def bits(scene: Scene) -> float:
        return pipe.score(shown(scene), canonical(scene)).bits_per_dim

    seen, unseen = scenes(count, "train", 1), scenes(count, "held_out", 1)
    twins = [(scene, impossible_twin(scene, index)) for index, scene in enumerate(seen)]
    possible = [bits(scene) for scene in seen]
    lower = [bits(twin) > own for (_, twin), own in zip(twins, possible, strict=True)]
    return {
        "bits_per_dim": round(float(np.mean(possible)), 4),
        "bits_per_dim_held_out": round(float(np.mean([bits(scene) for scene in unseen])), 4),
        "impossible_twin_lower": round(float(np.mean(lower)), 4),
    }


def denoiser(pipe: StarFlowPipeline, count: int, sampling: Sampling) -> dict[str, float]:
    """PSNR against the true frames of latents with data noise, decoded after each way of cleaning them."""
    sums: dict[str, list[float]] = {"clean": [], "noised": [], "tweedie": [], "learned": []}
    for index, scene in enumerate(scenes(count, "held_out", 1)):
        frames = render([scene], CLIP)
        latents = pipe.codec.encode(frames)
        noisy = add_noise(latents.cpu(), pipe.flow.config.noise_std, torch.Generator().manual_seed(index)).to(latents)
        text = pipe.prompting.states([canonical(scene)], "1:1", image=False)
        for name, found in _ways(pipe, latents, noisy, text):
            sums[name].append(psnr(pipe.codec.decode(found).numpy(), frames.numpy()))
    return {name: round(float(np.mean(values)), 2) for name, values in sums.items() if values}


def _ways(
    pipe: StarFlowPipeline, latents: torch.Tensor, noisy: torch.Tensor, text: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    yield "clean", latents
    yield "noised", noisy
    yield "tweedie", tweedie(pipe.flow, noisy, text)
    if pipe.flow.denoiser is not None:
        yield "learned", denoise(pipe.flow, noisy, text)

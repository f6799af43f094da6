"""How the published 7 billion parameters fit a device: what `--memory-budget` picks for 81 frames of 480 × 848, and what it counts.

    python benchmarks/budget.py                  # on tensors without values: no weights and no GPU are needed, a CPU and half a minute are
    python benchmarks/budget.py --errors mini    # what precisions and the 8-bit cache cost

Two tables: for each budget the way that is picked, and then every way with what it needs. Bytes of a stage are all that is on the
device in it: the reserve for the GPU's context and its libraries (assumed, not measured), weights, caches, activations. What an
allocator loses between tensors is not counted.

Errors: a clip is sampled in float32 to 1e-6 and then read once each way, which says how far every token is from where that way would
have put it given the same past, in units of the token's standard deviation.
"""

from __future__ import annotations

import argparse

import memory
import torch
from rig import FULL, PUBLISHED, VAE
from torch import Tensor

from reelflow.adapters.precision import PRECISIONS
from reelflow.adapters.vae import VideoCodec
from reelflow.evaluation.bench import flow_pipeline
from reelflow.flow import KVCache
from reelflow.pipelines.account import RESERVE, Account, Wish
from reelflow.pipelines.budget import choose, parse, ways, words
from reelflow.pipelines.offload import ByteCache
from reelflow.sampling import Schedule, certify, sample

T5 = {
    "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""flan-t5-xl, whose encoder is used."""
BUDGETS = ("12GB", "24GB", "48GB", "80GB", "140GB")
STAGES = ("text", "sample", "denoise", "decode")


def published() -> Account:
    """Of the 7 B model on a GPU."""
    from diffusers import AutoencoderKLWan
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        vae, text = AutoencoderKLWan.from_config(VAE | FULL.vae), T5EncoderModel(T5Config(**T5))
    return Account(PUBLISHED, VideoCodec(vae, 0.6), text, "cuda")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    return [row(*names), row(*["---"] * len(names))]


def picked(account: Account, wishes: dict[str, Wish], base: str) -> list[str]:
    lines = head("budget", "clip", "way", *STAGES, "host's memory", "to the device per pass")
    for budget in BUDGETS:
        for name, wish in wishes.items():
            plan = choose(account, wish, parse(budget), list(ways(base, True, "cuda", wish)), None)
            host, moved = account.host(plan.way, wish), account.moved(plan.way, wish)
            stages = [words(size) for size in account.stages(plan.way, wish).values()]
            lines.append(row(budget, name, plan.way, *stages, words(host), words(moved) if moved else "–"))
    return lines


def every(account: Account, wishes: dict[str, Wish], base: str) -> list[str]:
    lines = head("way, the best first", *wishes, "host's memory", "to the device per pass")
    first = next(iter(wishes.values()))
    for way in ways(base, True, "cuda", first):
        host, moved = account.host(way, first), account.moved(way, first)
        lines.append(row(way, *(words(account.need(way, wish)) for wish in wishes.values()), words(host), words(moved) if moved else "–"))
    return lines


class FloatCache(KVCache):
    """Keys and values rounded to 8-bit floating point, to compare with."""

    def write(self, layer: int, index: Tensor, new: tuple[Tensor, Tensor], used: int) -> tuple[Tensor, Tensor]:
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in new)
        return super().write(layer, index, (key, value), used)


def errors(model: str) -> list[str]:
    pipe = flow_pipeline(model, "cpu", "float32")
    noise, texts, guidance = memory.inputs(pipe, pipe.flow.config.window)
    latents, _ = sample(pipe.flow, noise, texts, guidance, schedule=Schedule(tolerance=1e-6))
    lines, known = head("way", "rms", "largest"), [name for name in PRECISIONS if name not in ("auto", "float32")]
    ways = [("float32", cache) for cache in (KVCache, ByteCache, FloatCache)] + [(name, KVCache) for name in known]
    for precision, cache in ways:
        flow = flow_pipeline(model, "cpu", precision).flow
        flow.deep_block.cache = cache
        found = certify(flow, latents, noise, texts, guidance)
        lines.append(row(f"{precision}, {cache.__name__}", f"{found.rms:.2g}", f"{found.largest:.2g}"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("float32", "bfloat16"), default="bfloat16", help="the best precision (default %(default)s)")
    parser.add_argument("--errors", metavar="MODEL", help="what each way costs in accuracy instead, on this model")
    options = parser.parse_args()
    if options.errors:
        print(*errors(options.errors), sep="\n")
        return
    account = published()
    wishes = {"guidance": Wish(*FULL.latents, guidance=True), "no guidance": Wish(*FULL.latents, guidance=False)}
    print(f"{account.clip(wishes['guidance'])}; reserve {words(RESERVE['cuda'])}\n")
    print(*picked(account, wishes, options.base), "", *every(account, wishes, options.base), sep="\n")


if __name__ == "__main__":
    main()

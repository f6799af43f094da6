"""Several processes that sample together, for test_parallel.py: `python ranks.py FOLDER`.

Modules are loaded once; then one process, two and four of them, forked from here, run what they can together. What each found
goes into FOLDER, `PROCESSES-RANK.safetensors`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from socket import create_server

import torch
import torch._dynamo  # what DTensor needs at its first use
import torch.distributed.tensor.parallel
from safetensors.torch import save_file
from torch import Tensor, nn

from reelflow.adapters.torchrun import join, ranks
from reelflow.config import FlowConfig
from reelflow.denoise import tweedie
from reelflow.flow import StarFlow
from reelflow.sampling import Schedule, certify, sample, stream

PLAIN = FlowConfig(
    channels=3, width=32, deep_width=64, layers=(1, 1, 2), head_dim=16, window=3, text_tokens=4, text_dim=6, position_span=4.0
)
OPTIONS = {"num_kv_heads": 2, "norm": "rms", "mlp": "swiglu", "qk_norm": True, "post_norm": True, "bias": False, "sos": False}
MODELS = {
    "plain": PLAIN,
    "no text": PLAIN.model_copy(update={"text_tokens": 0, "text_dim": 0}),
    "options": PLAIN.model_copy(update=OPTIONS),
}
CASES = {
    "plain": ("beyond the window", "ring", "certificate", "stream", "prefix, one by one", "no guidance"),
    "no text": ("beyond the window", "log_det", "tweedie"),
    "options": ("ring", "certificate", "stream", "log_det", "tweedie"),
}
TOGETHER = {1: CASES, 2: ("plain", "no text"), 4: ("options",)}
EXACT = Schedule(tolerance=0.0, window=4)


def build(config: FlowConfig) -> StarFlow:
    torch.manual_seed(0)
    flow = StarFlow(config).requires_grad_(False)
    for name, module in flow.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("proj_out"):
            nn.init.normal_(module.weight, std=0.05)
    return flow


def find(flow: StarFlow, case: str) -> Tensor:
    """What one way to sample gives (float32), or the forward map."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    texts, guidance = (torch.randn(4, 4, 6, generator=generator), 2.0) if flow.config.text_tokens else (None, 0.0)
    conditional, one, other = (None,) * 3 if texts is None else (texts[:2], texts[::2], texts[1::2])
    match case:
        case "beyond the window":
            return sample(flow, noise, texts, guidance, schedule=EXACT)[0]
        case "ring":
            return sample(flow, noise, texts, guidance, schedule=EXACT, ring=True)[0]
        case "certificate":
            return torch.tensor(certify(flow, find(flow, "ring"), noise, texts, guidance, ring=True))
        case "stream":
            return torch.stack([*stream(flow, noise[:1], [(0, one), (2, other)], guidance, schedule=EXACT)], 1)
        case "prefix, one by one":
            return sample(flow, noise[:, :3], texts, guidance, noise[:, :2], schedule=Schedule("sequential"))[0]
        case "no guidance":
            return sample(flow, noise[:, :1], conditional, schedule=EXACT)[0]
        case "log_det":
            return flow(noise[:, :2], conditional).log_det
        case "tweedie":
            return tweedie(flow, noise[:, :2], conditional)
    raise AssertionError(case)


def run(folder: Path, count: int, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    if count > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in told.items()}
    join("cpu")
    found = {}
    for model in TOGETHER[count]:
        flow = build(MODELS[model])
        flow.share(ranks(flow.config, "cpu"))
        found |= {f"{model}: {case}": find(flow, case).detach().contiguous() for case in CASES[model]}
        layers = (p.to_local() if isinstance(p, torch.distributed.tensor.DTensor) else p for p in flow.deep_block.layers.parameters())
        found[f"{model}: weights"] = torch.tensor(sum(p.untyped_storage().nbytes() // 4 for p in layers))
    save_file(found, folder / f"{count}-{rank}.safetensors")


def main(folder: Path) -> int:
    fork = multiprocessing.get_context("fork")
    failed = 0
    for count in TOGETHER:
        with create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = [fork.Process(target=run, args=(folder, count, rank, port)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            failed += process.exitcode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""The objective of a flow: exact NLL and flow-score matching from one backward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reelflow.adapters.checkpoint import require_match
from reelflow.adapters.hub import resolve
from reelflow.adapters.lora import Adapted, flow_weights
from reelflow.adapters.text import TextEncoder
from reelflow.likelihood import HALF_LOG_TAU
from reelflow.training import flops, parallel
from reelflow.training.adapter import add_adapters, fill_adapters
from reelflow.training.checkpoints import read_into
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.feed import FlowFeed, Rows, Source
from reelflow.training.foresight import ForeseeingFlow
from reelflow.training.loss import nll, noise_weight, score_loss, score_target
from reelflow.training.parallel import Ranks


class FlowObjective:
    """The flow with its denoiser, and the text encoder where it is trained along.

    Args:
        text: the text encoder; its weights are trained if `config.text` describes a new one, or `config.train_text` says so.
        ranks: this process among those of the run, None: it is alone.

    Raises:
        ValueError: weights to start from that do not fit.
    """

    def __init__(self, config: TrainConfig, text: TextEncoder, ranks: Ranks | None = None):
        torch.manual_seed(config.seed)
        self.config, self.text = config, text
        foresees = any(stage.foresight for stage in config.stages)
        self.losses: tuple[str, ...] = ("loss", "score_loss", *(["foresight_loss"] if foresees else []))
        self.ranks = ranks or Ranks(torch.device(config.device))
        train_text = config.train_text or isinstance(config.text, TextConfig)
        text.model.to(self.ranks.device).requires_grad_(train_text)
        self.flow = new_flow(config, self.ranks)
        named = {f"flow.{name}": p for name, p in self.flow.named_parameters()}
        if train_text:
            named |= {f"text.{name}": p for name, p in text.model.named_parameters()}
        self.weights: dict[str, nn.Parameter] = {name: p for name, p in named.items() if p.requires_grad}
        self._denoises = any(name.startswith("flow.denoiser.") for name in self.weights)
        inside = (name for name, p in self.weights.items() if ".layers." in name and p.ndim == 2 and name.startswith("flow."))
        self.matrices: frozenset[str] = frozenset(inside)

    def feed(self, source: Source) -> FlowFeed:
        return FlowFeed(self.config, source, self.ranks.rank, self.ranks.count, pin=self.ranks.device.type == "cuda")

    def separate(self, step: int) -> bool:
        """Whether the denoiser learns."""
        return self._denoises and self.config.stage(step).denoiser

    def work(self, shape: torch.Size, step: int) -> tuple[float, float]:
        rows, frames, _, height, width = shape
        places, adapters, foresight = height * width, self.config.lora is not None, self.config.stage(step).foresight > 0
        work = flops.training_step(self.config.flow, frames, places, self.separate(step), adapters, foresight)
        return rows * frames * places, rows * work

    @staticmethod
    def explain(means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["loss"], "bits_per_dim": (means["loss"] + HALF_LOG_TAU) / math.log(2)} | means

    def backward(self, rows: Rows, step: int) -> Tensor:
        """Gradients of some rows. Returns their share of the flow's and the denoiser's loss, times the number of ranks."""
        denoise, device = self.separate(step), self.ranks.device
        x = rows.x.to(device, non_blocking=True).requires_grad_(denoise)
        learned_BF = None if rows.learned_BF is None else rows.learned_BF.to(device)
        share, noise_std_B = rows.share * self.ranks.count, rows.noise_std_B.to(device)
        weight_B = noise_weight(noise_std_B, self.config.about.prompt.noise) * (share / len(x))
        with parallel.precision(self.config, device):
            states = self.text.states(rows.prompts) if self.flow.config.text_tokens else None
            foresight = self.config.stage(step).foresight if x.shape[1] > 1 else 0.0
            if foresight:
                nll_B, off_B = self.flow.foreseen(x, rows.clean.to(device, non_blocking=True), states, learned_BF)
            else:
                nll_B, off_B = nll(self.flow, x, states, learned_BF), x.new_zeros(len(x))
        (weight_B * (nll_B + foresight * off_B)).sum().backward()
        score = torch.zeros((), device=device)
        if denoise:
            assert x.grad is not None
            with parallel.precision(self.config, device):
                score = score_loss(self.flow, x, score_target(x.grad, noise_std_B, weight_B), states)
            (share * score).backward()
        found = (share * nll_B.detach().mean(), share * score.detach(), share * off_B.detach().mean())
        return torch.stack(found[: len(self.losses)])

    def averaged_text(self, values: Mapping[str, Tensor]) -> TextEncoder:
        """The text encoder with averaged weights, a copy on the CPU. values: `Trainer.averaged`."""
        text = copy.copy(self.text)
        text.model = copy.deepcopy(self.text.model).cpu().requires_grad_(False)
        for name, p in text.model.named_parameters():
            if f"text.{name}" in values:
                p.copy_(values[f"text.{name}"])
        return text


def new_flow(config: TrainConfig, ranks: Ranks) -> ForeseeingFlow:
    """The flow to train, on its device, sharded and with adapters as configured: untrained, or with the weights of `init`."""
    with torch.device("meta" if config.init else ranks.device):
        flow = ForeseeingFlow(config.flow).train()
    if config.lora:
        if config.precision == "bfloat16":
            flow.set_precision(torch.bfloat16)  # of weights that stay as they are, which is how they run anyway
        add_adapters(flow, config.lora)
    if ranks.mesh is not None:
        parallel.shard(flow, config, ranks.mesh)
    if config.init:
        folder = resolve(config.init) / "transformer"
        flow.to_empty(device="cpu" if config.offload else ranks.device)
        state = {name.replace(".base_layer", ""): p.detach() for name, p in flow.named_parameters() if ".lora_" not in name}
        weights = flow_weights(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        require_match({name: tuple(tensor.shape) for name, tensor in state.items()}, shapes, str(folder))
        read_into(folder, state, ranks)
        if isinstance(weights, Adapted):
            for name in weights.changed:
                parallel.fill(state[name], weights[name])
        if config.lora:
            fill_adapters(flow, config.seed)
    parallel.prepare_layers(flow, config)
    return flow

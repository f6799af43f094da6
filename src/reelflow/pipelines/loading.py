"""Loading a flow with its codec and text encoder: straight from the files into the precision and the place they run in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import load_into
from reelflow.adapters.convert import open_checkpoint
from reelflow.adapters.hub import part_folder
from reelflow.adapters.lora import flow_weights
from reelflow.adapters.precision import QUANTISED, compute_dtype, quantiser, settle
from reelflow.adapters.text import load_text_encoder, text_shapes
from reelflow.adapters.torchrun import ranks
from reelflow.adapters.vae import Codec, load_codec
from reelflow.config import FlowConfig, ModelConfig
from reelflow.flow import StarFlow
from reelflow.pipelines.base import Device, say
from reelflow.pipelines.framing import Framing
from reelflow.pipelines.offload import DEEP_LAYERS, host_memory
from reelflow.sampling import default_context

if TYPE_CHECKING:
    from reelflow.pipelines.budget import Plan
    from reelflow.pipelines.trial import Wish


@dataclass(frozen=True)
class Asked:
    """The clip that a memory budget is for, as the pipeline's methods take it; by default one of the trained length from a prompt,
    with the model's own guidance.

    task: generate, animate, edit or extend; to edit or extend, the longest video that the model reads.  size: (width, height), of
    families that take any.
    """

    seconds: float | None = None
    frames: int | None = None
    aspect: str | None = None
    guidance: float | None = None
    stream: bool = False
    ring: bool = False
    denoise: bool = True
    certify: bool = False
    task: str = "generate"
    size: tuple[int, int] | None = None

    def wish(self, about: ModelConfig, config: FlowConfig, codec: Codec) -> Wish:
        """Raises ValueError for a length or an aspect that the model does not make."""
        from reelflow.pipelines.trial import Wish

        framing, guidance = Framing(about, codec), about.guidance if self.guidance is None else self.guidance
        length = framing.length(self.seconds, self.frames)
        if self.task == "edit" and about.whole_edits:
            length = max(length, about.frames)
        frames, height, width = codec.latent_shape(length, *framing.frame_size(self.aspect or "1:1"))
        given = {"animate": 1, "edit": frames, "extend": min(frames, default_context(config.window))}.get(self.task, 0)
        frames, window = (2 * frames, 2 * frames) if self.task == "edit" else (frames, None)
        return Wish(
            frames, height, width, bool(guidance and config.text_tokens), given=given, window=window, stream=self.stream, ring=self.ring,
            denoise=self.denoise, certify=self.certify,
        )  # fmt: skip


def load_parts(source: Path, device: Device, precision: str, budget: int | None, asked: Asked) -> dict[str, Any]:
    """What `StarFlowPipeline` is made of, from a model folder or a reference checkpoint file (its codec and T5 from beside it or
    from Hugging Face).

    Raises:
        ValueError: what is missing or does not fit, a precision or budget that this machine or this model cannot have, processes
            that cannot share the model.
    """
    folder, device = source if source.is_dir() else source.parent, torch.device(device)
    weights: Mapping[str, Tensor]
    if source.is_dir():
        about = ModelConfig.read(source / "config.json")
        config = FlowConfig.read(source / "transformer" / "config.json")
        weights = flow_weights(source / "transformer")
    else:
        about, config, weights = open_checkpoint(source)
    with torch.device("meta"):
        flow = StarFlow(config)
    together, vae = ranks(config, device), part_folder(folder, "vae", about.parts)
    texts = [part_folder(folder, part, about.parts) for part in ("text_encoder", "tokenizer")] if config.text_tokens else []
    if together.size > 1 and (budget is not None or precision in QUANTISED):
        raise ValueError(f"{precision if budget is None else 'a memory budget'} is for one process; under torchrun use float32 or bfloat16")
    plan = _plan(about, flow, vae, texts, device, precision, budget, asked) if budget is not None else None
    precision = plan.way.precision if plan else settle(precision, device, sum(p.numel() for p in flow.parameters()))
    far = plan is not None and plan.way.layers == "host"
    rest = torch.device("cpu") if plan and plan.way.turns else device
    place = device if precision in QUANTISED else rest  # a device packs what it is going to compute with

    flow.set_precision(compute_dtype(precision))
    where = lambda name: "cpu" if far and name.startswith(DEEP_LAYERS) else place  # noqa: E731
    load_into(flow, weights, where, "declared", after=quantiser(flow, precision, device))
    flow.share(together)
    codec = load_codec(vae, about.latent_scale, rest, getattr(torch, plan.way.codec) if plan else torch.float32)
    text = load_text_encoder(texts[0], texts[1], config.text_tokens, rest) if texts else None
    if plan:
        plan.settle(flow, device)
    return {"about": about, "flow": flow, "codec": codec, "text": text, "device": device, "precision": precision, "plan": plan}


def _plan(
    about: ModelConfig, flow: StarFlow, vae: Path, texts: list[Path], device: torch.device, precision: str, budget: int, asked: Asked
) -> Plan:
    """The way to run it within the budget, said in one line. Raises ValueError where there is none."""
    from reelflow.pipelines.account import Account
    from reelflow.pipelines.budget import choose, possible

    codec = load_codec(vae, about.latent_scale, "meta")
    account = Account(flow.config, codec, text_shapes(texts[0]) if texts else None, device.type)
    wish = asked.wish(about, flow.config, codec)
    plan = choose(account, wish, budget, possible(precision, device, flow, wish), host_memory())
    say(str(plan))
    return plan


__all__ = ["Asked", "load_parts"]

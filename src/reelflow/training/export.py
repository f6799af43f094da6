"""What a run of a flow comes to: its pipeline as it stands, and the folder of a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from reelflow.adapters import lora
from reelflow.adapters.checkpoint import new_folder, save_weights
from reelflow.adapters.text import no_progress_bar
from reelflow.adapters.vae import load_codec
from reelflow.flow import StarFlow
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.training import adapter, parallel
from reelflow.training.flow import FlowObjective
from reelflow.training.trainer import Trainer


def flow_state(trainer: Trainer[FlowObjective]) -> dict[str, Tensor]:
    """All of the flow with averaged weights, on the CPU of the first rank (elsewhere empty); with adapters: added. All ranks call it."""
    config, average = trainer.objective.config, trainer.averaged()
    found = {}
    for name, p in trainer.objective.flow.named_parameters():
        value = parallel.full(average.get(f"flow.{name}", p.detach()))
        if trainer.ranks.first:
            found[name] = value.cpu()
    if config.lora:
        adapters = {name: found.pop(name) for name in list(found) if ".lora_" in name}
        found = {name.replace(".base_layer", ""): value.float() for name, value in found.items()}
        made = lora.Lora(Path(), adapter.about(config.lora, config.about, config.about), adapter.taken_out(adapters))
        for layer in made.layers:
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + made.change(layer)
    return found


def averaged(trainer: Trainer[FlowObjective]) -> StarFlowPipeline | None:
    """The pipeline of the averaged weights as they stand, on the first rank; the trainer goes on untouched. All ranks call it."""
    state = flow_state(trainer)
    if not trainer.ranks.first:
        return None
    config, device = trainer.objective.config, trainer.device
    with torch.device("meta"):
        flow = StarFlow(config.flow)
    flow.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    if device.type == "cuda":
        flow.set_precision(torch.bfloat16).to(device)
    text = trainer.objective.averaged_text(trainer.averaged())
    text.model.to(device)
    return StarFlowPipeline(config.about, flow, load_codec(config.vae, config.about.latent_scale, device), text)


def export(trainer: Trainer[FlowObjective], target: Path) -> Path:
    """Write the averaged weights as a model folder: the flow in bfloat16, the text encoder in float32, the codec copied.

    All ranks call it, the first one writes.
    """
    config, state = trainer.objective.config, flow_state(trainer)
    if not trainer.ranks.first:
        return target
    text = trainer.objective.averaged_text(trainer.averaged())
    if target.exists():
        shutil.rmtree(target)
    with new_folder(target) as folder:
        save_weights({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, folder / "transformer")
        config.flow.write(folder / "transformer" / "config.json")
        config.about.write(folder / "config.json")
        with no_progress_bar():
            text.model.save_pretrained(str(folder / "text_encoder"))
        text.tokenizer.save_pretrained(str(folder / "tokenizer"))
        shutil.copytree(config.vae, folder / "vae")
    return target


__all__ = ["averaged", "export", "flow_state"]

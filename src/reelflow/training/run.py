"""A whole run: cached latents in, a model folder out."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from reelflow.adapters.checkpoint import new_folder, save_weights
from reelflow.adapters.text import load_text_encoder, no_progress_bar
from reelflow.adapters.vae import load_codec
from reelflow.clip import contact_sheet
from reelflow.pipelines.starflow import StarFlowPipeline
from reelflow.training.batches import CachedLatents
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.text import new_text_encoder
from reelflow.training.trainer import Parts, Trainer


def run(config: TrainConfig, folder: Path, on_log: Callable[[dict], None] = lambda row: None) -> Path:
    """Train, or go on where the folder's checkpoint stands. Returns the model folder written at the end.

    Args:
        folder: of the run: `checkpoint.pt`, `log.jsonl`, `samples/`, at the end `model/`.
        on_log: called with every logged row (step, loss, bits_per_dim, score_loss, grad_norm, tokens_per_second, seconds_left).

    Raises:
        ValueError: latents, codec or text encoder that do not fit, a checkpoint of another architecture, a loss that is not finite.
    """
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    source = CachedLatents(config)
    torch.manual_seed(config.seed)
    if isinstance(config.text, TextConfig):
        text = new_text_encoder(config.text, config.flow.text_tokens, source.captions())
    else:
        text = load_text_encoder(config.text / "text_encoder", config.text / "tokenizer", config.flow.text_tokens, config.device)
    if text.width != config.flow.text_dim:
        raise ValueError(f"flow.text_dim = {config.flow.text_dim}, the text encoder gives {text.width}; make them equal")
    trainer = Trainer(config, source, text, folder)
    trainer.run(on_log, write_samples)
    return export(trainer, folder / "model") if trainer.rank == 0 else folder / "model"


def averaged(trainer: Trainer) -> StarFlowPipeline:
    """The pipeline of the averaged weights as they stand; the trainer goes on untouched."""
    parts = cast(Parts, copy.deepcopy(trainer.average.module).cpu())
    text = copy.copy(trainer.text)
    text.model = (parts.text if parts.text is not None else copy.deepcopy(text.model).cpu()).eval().requires_grad_(False)
    return StarFlowPipeline(trainer.config.about, parts.flow, load_codec(trainer.config.vae, trainer.config.about.latent_scale), text)


def write_samples(trainer: Trainer) -> None:
    """A contact sheet per sample prompt, seed 0."""
    pipe, prompts = averaged(trainer), list(trainer.config.sample_prompts)
    folder = trainer.folder / "samples"
    folder.mkdir(exist_ok=True)
    for index, clip in enumerate(pipe.generate_batch(prompts, [0] * len(prompts))):
        contact_sheet(clip, columns=9, tile=96).save(folder / f"{trainer.step:06d}-{index}.png")


def export(trainer: Trainer, target: Path) -> Path:
    """Write the averaged weights as a model folder: the flow in bfloat16, the text encoder in float32, the codec copied."""
    pipe = averaged(trainer)
    assert pipe.text is not None
    if target.exists():
        shutil.rmtree(target)
    with new_folder(target) as folder:
        state = {name: tensor.to(torch.bfloat16) for name, tensor in pipe.flow.state_dict().items()}
        save_weights(state, folder / "transformer")
        pipe.flow.config.write(folder / "transformer" / "config.json")
        pipe.about.write(folder / "config.json")
        with no_progress_bar():
            pipe.text.model.save_pretrained(str(folder / "text_encoder"))
        pipe.text.tokenizer.save_pretrained(str(folder / "tokenizer"))
        shutil.copytree(trainer.config.vae, folder / "vae")
    return target

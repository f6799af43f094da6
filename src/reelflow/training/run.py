"""A whole run: clips or prepared latents in, a model folder (or an adapter) out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reelflow.adapters.hub import part_folder
from reelflow.adapters.text import TextEncoder, load_text_encoder
from reelflow.config import ModelConfig
from reelflow.training import adapter, parallel
from reelflow.training.batches import CachedLatents
from reelflow.training.config import TextConfig, TrainConfig
from reelflow.training.export import export
from reelflow.training.flow import FlowObjective
from reelflow.training.parallel import Ranks
from reelflow.training.raw import RawClips
from reelflow.training.samples import write_samples
from reelflow.training.shards import unfinished
from reelflow.training.text import new_text_encoder
from reelflow.training.trainer import Trainer

if TYPE_CHECKING:
    from reelflow.training.svd.config import SvdConfig


def run(
    config: TrainConfig | SvdConfig, folder: Path, on_log: Callable[[dict], None] = lambda row: None, export_only: bool = False
) -> Path:
    """Train, or go on where the folder's latest checkpoint stands. Returns what is written at the end.

    Args:
        folder: of the run: `checkpoints/`, `log.jsonl`, `samples/`, at the end `model/`, or `NAME.safetensors` with `lora`.
        on_log: called with every logged row on the first rank (see `progress.Meter.row`).
        export_only: train no further, write what the latest checkpoint holds.

    Raises:
        ValueError: latents, codec or text encoder that do not fit, a checkpoint of another architecture, a loss that is not finite.
        LostRankError: another rank of the run is gone.
    """
    ranks = parallel.join(config)
    with closing(open_source(config, folder, ranks)) as source:
        trainer = Trainer(config, source, open_objective(config, source, ranks), folder, ranks)
        if ranks.count > 1:
            parallel.tell_when_ended(trainer.standing)
        if not export_only:
            trainer.run(on_log, write_samples)
        elif not trainer.step:
            raise ValueError(f"{folder}: holds no checkpoint to export; train first")
    with parallel.answering(trainer.standing):
        target = write_result(trainer)
        ranks.meet()
    parallel.leave()  # only here: where a rank has failed, the others may never come to part
    return target


def open_source(config: TrainConfig | SvdConfig, folder: Path, ranks: Ranks) -> Any:
    """Where the batches of a run come from: `latents`, where they were prepared, else the clips of `data`.

    Args:
        folder: of the run.

    Raises:
        ValueError: data that do not fit.
    """
    prepared: Any = CachedLatents
    raw: Any = RawClips
    if not isinstance(config, TrainConfig):
        from reelflow.training.svd.shows import PreparedShows, RawShows

        prepared, raw = PreparedShows, RawShows
    if config.latents is None:
        return raw(config, folder, ranks.device, ranks.rank, ranks.count)
    source = prepared(config)
    if ranks.first and (missing := unfinished(config.latents)):
        note = f"{config.latents}: {missing} parts of the data are not prepared yet; reelflow train prepare goes on where it stopped"
        warnings.warn(note, UserWarning, stacklevel=2)
    return source


def open_objective(config: TrainConfig | SvdConfig, source: Any, ranks: Ranks) -> Any:
    """What a run trains. Raises ValueError for parts that do not fit."""
    if isinstance(config, TrainConfig):
        torch.manual_seed(config.seed)
        return FlowObjective(config, open_text(config, source, ranks.device), ranks)
    from reelflow.training.svd.model import open_unet
    from reelflow.training.svd.objective import SvdObjective

    return SvdObjective(config, open_unet(config, source.states, ranks.device), ranks)


def write_result(trainer: Trainer[Any]) -> Path:
    """The model folder, or the file of adapters. All ranks call it, the first one writes."""
    if isinstance(trainer.objective, FlowObjective):
        if trainer.config.lora:
            return adapter.export(trainer, lambda folder: ModelConfig.read(folder / "config.json"))
        return export(trainer, trainer.folder / "model")
    from reelflow.adapters.svd import read_about
    from reelflow.training.svd import export as svd

    if trainer.config.lora:
        return adapter.export(trainer, read_about)
    return svd.export(trainer, trainer.folder / "model")


def open_text(config: TrainConfig, source: CachedLatents | RawClips, device: torch.device) -> TextEncoder:
    """The text encoder of a configuration. Raises ValueError where it does not fit the flow."""
    tokens = config.flow.text_tokens
    if isinstance(config.text, TextConfig):
        text = new_text_encoder(config.text, tokens, source.captions())
    else:
        low = device.type == "cuda" and config.precision == "bfloat16" and not config.train_text
        encoder, tokenizer = (part_folder(config.text, part, config.about.parts) for part in ("text_encoder", "tokenizer"))
        text = load_text_encoder(encoder, tokenizer, tokens, device, torch.bfloat16 if low else torch.float32)
    if text.width != config.flow.text_dim:
        raise ValueError(f"flow.text_dim = {config.flow.text_dim}, the text encoder gives {text.width}; make them equal")
    trained = config.train_text or isinstance(config.text, TextConfig)
    return text if trained else source.with_texts(text)

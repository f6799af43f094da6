"""What a run of Stable Video Diffusion comes to: the folder of a whole model, for diffusers and for us, or a file of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelflow.adapters import lora
from reelflow.adapters.checkpoint import new_folder
from reelflow.adapters.hub import resolve
from reelflow.adapters.svd import CLIP_MEAN, CLIP_STD, PIPELINE, SCHEDULER, Parts, clip_norm, open_scheduler
from reelflow.adapters.text import no_progress_bar
from reelflow.training import adapter
from reelflow.training.svd.config import SvdConfig
from reelflow.training.svd.model import TOWER, open_image_encoder, open_vae
from reelflow.training.svd.objective import SvdObjective
from reelflow.training.trainer import Trainer

PARTS = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"], TOWER: ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
    "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
}  # fmt: skip


def unet_state(trainer: Trainer[SvdObjective]) -> dict[str, Tensor]:
    """All of the UNet with averaged weights, on the CPU; with adapters: added."""
    config, average = trainer.objective.config, trainer.averaged()
    found = {name: average.get(f"unet.{name}", p.detach()).cpu() for name, p in trainer.objective.unet.named_parameters()}
    if config.lora:
        adapters = {name: found.pop(name) for name in list(found) if ".lora_" in name}
        found = {name.replace(".base_layer", ""): value for name, value in found.items()}
        made = lora.Lora(Path(), adapter.about(config.lora, config.about, config.about), adapter.taken_out(adapters))
        for layer in made.layers:
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + made.change(layer)
    return found


def averaged_unet(trainer: Trainer[SvdObjective]) -> Any:
    """The UNet of the averaged weights as they stand, on the CPU; the trainer goes on untouched."""
    unet: Any = trainer.objective.unet
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict({name: value.clone() for name, value in unet_state(trainer).items()}, assign=True)
    return copy.eval()


def averaged_parts(trainer: Trainer[SvdObjective]) -> Parts:
    """The model of the averaged weights as they stand, on the run's device; the trainer goes on untouched."""
    config, device = trainer.objective.config, trainer.device
    vae, tower = open_vae(config, device), open_image_encoder(config, device)
    unet = averaged_unet(trainer).to(device)
    norm = clip_norm(resolve(config.init)) if config.init else ()
    return Parts(config.about, unet, vae, tower, scheduler(config), *norm)


def scheduler(config: SvdConfig) -> Any:
    """diffusers' scheduler that the model is sampled with: of the model it starts from, or the released ones', up to `sigma_max`."""
    from diffusers import EulerDiscreteScheduler

    steps = dict(open_scheduler(resolve(config.init)).config) if config.init else SCHEDULER
    return EulerDiscreteScheduler.from_config(steps if config.sigma_max is None else steps | {"sigma_max": config.sigma_max})


def export(trainer: Trainer[SvdObjective], target: Path) -> Path:
    """Write the averaged weights as a folder of diffusers, in half precision. All ranks call it, the first one writes."""
    config = trainer.objective.config
    if not trainer.ranks.first:
        return target
    if target.exists():
        shutil.rmtree(target)
    with new_folder(target) as folder, no_progress_bar():
        averaged_unet(trainer).half().save_pretrained(str(folder / "unet"))
        scheduler(config).save_pretrained(str(folder / "scheduler"))
        if config.init:
            copy_parts(resolve(config.init), folder, ("feature_extractor", TOWER))
            shutil.copytree(config.vae, folder / "vae")
        else:
            write_parts(config, folder)
        config.about.write(folder / "config.json")
        _write(folder / "model_index.json", {"_class_name": PIPELINE, "_diffusers_version": _version(), **PARTS})
        for path in folder.rglob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes files for their owner alone
    return target


def copy_parts(source: Path, folder: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, folder / part)


def write_parts(config: SvdConfig, folder: Path) -> None:
    """What is not trained here, of a new model."""
    for part, module in (("vae", open_vae(config)), (TOWER, open_image_encoder(config))):
        module.half().save_pretrained(str(folder / part))
    normal = {
        "image_processor_type": "CLIPImageProcessor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224}, "do_resize": True, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "resample": 3, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "feature_extractor").mkdir()
    _write(folder / "feature_extractor" / "preprocessor_config.json", normal)


def _version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


__all__ = ["averaged_parts", "averaged_unet", "export", "unet_state"]

"""A reference checkpoint (`.pth` and YAML) as a model folder, strictly and in little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelflow.adapters.checkpoint import SHARD_BYTES, few, new_folder, read_pickle, require_finite, require_match, write_shards
from reelflow.adapters.hub import licence_notice
from reelflow.adapters.names import flow_shapes, rename
from reelflow.adapters.reference import config_from_arguments, read_arguments
from reelflow.config import FlowConfig, ModelConfig

_PUBLISHED = Path(__file__).with_name("published.json")
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "spiece.model")


class Reference(NamedTuple):
    """A reference checkpoint, checked: every tensor has its place."""

    model: ModelConfig
    flow: FlowConfig
    keys: dict[str, str]
    """Our name → the checkpoint's key, in our order."""


def inspect(checkpoint: str | Path, arguments: str | Path | Mapping[str, Any] | None = None) -> Reference:
    """Configuration and names of a reference checkpoint; reads no values.

    Args:
        checkpoint: the `.pth` file.
        arguments: its YAML file, or the arguments themselves; None: by the file's name, where it is a published one.

    Raises:
        ValueError: no such configuration, settings not offered here, or tensors missing, extra or misshaped.
    """
    checkpoint = Path(checkpoint)
    state = read_pickle(checkpoint)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    source = str(checkpoint if arguments is None or isinstance(arguments, Mapping) else arguments)
    values = arguments if isinstance(arguments, Mapping) else read_arguments(arguments) if arguments else _published(checkpoint)
    text_dim = next((shape[1] for key, shape in shapes.items() if key.endswith("proj_txt.weight") and len(shape) == 2), None)
    model, flow = config_from_arguments(values, name=checkpoint.stem, text_dim=text_dim, source=source)
    if licence_notice(checkpoint.name):
        model = model.model_copy(update={"licence": "apple-amlr"})
    keys: dict[str, str] = {}
    unknown = []
    for key in shapes:
        try:
            name = rename(key, len(flow.layers))
        except ValueError:
            unknown.append(key)
            continue
        if name and keys.setdefault(name, key) != key:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{checkpoint}: {len(unknown)} unknown tensors ({few(unknown)}); not a STARFlow of {source}")
    expected = flow_shapes(flow)
    require_match(expected, {name: _shape(name, shapes[key]) for name, key in keys.items()}, str(checkpoint))
    return Reference(model, flow, {name: keys[name] for name in expected})


def _published(checkpoint: Path) -> dict[str, Any]:
    published = json.loads(_PUBLISHED.read_text(encoding="utf-8"))
    for name, arguments in published.items():
        if checkpoint.stem.startswith(name):
            return arguments
    raise ValueError(
        f"{checkpoint}: not a published file name ({', '.join(published)}); "
        "convert it first: reelflow models convert FILE --config YAML -o FOLDER"
    )


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Start tokens are (1, 1, c) there and (c,) here."""
    return shape[2:] if name.endswith(".sos") and shape[:2] == (1, 1) else shape


def open_checkpoint(
    checkpoint: str | Path, arguments: str | Path | Mapping[str, Any] | None = None
) -> tuple[ModelConfig, FlowConfig, dict[str, Tensor]]:
    """A reference checkpoint as it is, under our names, mapped from disk: for `load_into`, without converting the file.

    Raises:
        ValueError: as `inspect`.
    """
    found = inspect(checkpoint, arguments)
    state = read_pickle(checkpoint)
    return found.model, found.flow, {name: _ours(name, state[key]) for name, key in found.keys.items()}


def _ours(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(_shape(name, tuple(tensor.shape)))


def convert(
    checkpoint: str | Path,
    arguments: str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a reference checkpoint as a model folder.

    The file is mapped anew for every shard and let go after it, so memory holds one shard whatever the file's size. The
    folder appears whole, or, after an error or Ctrl-C, not at all.

    Args:
        checkpoint, arguments: as in `inspect`.
        out: the folder to make.
        vae: diffusers folder of the VAE, or `Wan2.2_VAE.pth`, to copy in; None: config.json names where it comes from.
        text_encoder: folder with T5 and its tokenizer (together, or in `text_encoder/` and `tokenizer/`), likewise.
        dtype: precision to store; None: as in the checkpoint.
        max_shard_bytes: size of one safetensors file.
        progress: called with (bytes written, bytes in all) after each shard of the flow's weights.

    Raises:
        ValueError: as `inspect`; also NaN or infinity in the weights, parts that do not fit, `out` exists, disk full.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    found = inspect(checkpoint, arguments)
    state = read_pickle(checkpoint)
    sizes = {name: state[key].numel() * (dtype or state[key].dtype).itemsize for name, key in found.keys.items()}
    del state
    with new_folder(out) as folder:
        free = shutil.disk_usage(folder).free
        if free < sum(sizes.values()):
            raise ValueError(f"{out}: needs {sum(sizes.values()) / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        parts = dict(found.model.parts)
        if vae is not None:
            _copy_vae(Path(vae), folder / "vae", found.flow.channels)
            del parts["vae"]
        if text_encoder is not None:
            _copy_text_encoder(Path(text_encoder), folder, found.flow.text_dim)
            parts = {part: place for part, place in parts.items() if part == "vae"}
        model = found.model.model_copy(update={"parts": parts})

        def read(names: list[str]) -> dict[str, Tensor]:
            state = read_pickle(checkpoint)  # a mapping of its own, which lives as long as this shard
            tensors = {name: _ours(name, state[found.keys[name]]) for name in names}
            require_finite(tensors, str(checkpoint))
            return {name: tensor.to(dtype) for name, tensor in tensors.items()}

        write_shards(sizes, read, folder / "transformer", max_shard_bytes, progress=progress)
        found.flow.write(folder / "transformer" / "config.json")
        model.write(folder / "config.json")
    return model


def _copy_vae(source: Path, target: Path, channels: int) -> None:
    if source.is_file():
        from reelflow.adapters.vae import load_codec

        codec = load_codec(source)
        held = codec.channels
        codec.save(target)
    else:
        source = source / "vae" if (source / "vae").is_dir() else source
        _copy(source, target, _MODEL_FILES)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        held = config.get("z_dim", config.get("latent_channels"))
    if held != channels:
        raise ValueError(f"{source}: this VAE has {held} latent channels, the flow {channels}; give the VAE it was trained with")


def _copy_text_encoder(source: Path, folder: Path, width: int) -> None:
    encoder = source / "text_encoder" if (source / "text_encoder").is_dir() else source
    tokenizer = source / "tokenizer" if (source / "tokenizer").is_dir() else source
    _copy(encoder, folder / "text_encoder", _MODEL_FILES)
    _copy(tokenizer, folder / "tokenizer", _TOKENIZER_FILES)
    held = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8")).get("d_model")
    if held != width:
        raise ValueError(f"{source}: this text encoder has width {held}, the flow reads {width}; give the one it was trained with")


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a part; a part without configuration or content is an error."""
    files = sorted({path for pattern in patterns for path in source.glob(pattern)}) if source.is_dir() else []
    if not files or (patterns is _MODEL_FILES and not {"config.json"} < {path.name for path in files}):
        raise ValueError(f"{source}: nothing to copy; expected {', '.join(patterns)}")
    target.mkdir(parents=True)
    for path in files:
        try:
            shutil.copyfile(path, target / path.name)
        except OSError as error:
            raise ValueError(f"{path}: cannot be copied ({error.strerror}); check permissions and free space") from None

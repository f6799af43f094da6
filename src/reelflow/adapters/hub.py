"""Where models come from: the package, a local folder or file, or Hugging Face; and under which licence.

Nothing here reaches the network unless the name given is a Hugging Face id, or a model folder names one for a part it
does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parent.parent / "weights"
FILES = ("*.safetensors", "*.json", "spiece.model", "tokenizer.model", "*.txt")
"""What is fetched: safetensors, configurations, tokenizers. Never a pickle."""

NAMES = {
    "svd": "stabilityai/stable-video-diffusion-img2vid",
    "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
    "svd-xt-1.1": "stabilityai/stable-video-diffusion-img2vid-xt-1-1",
}
"""Short names of models that are fetched."""
_ORIGINAL = ("svd*.safetensors",)
_FULL, _HALF = ("*/diffusion_pytorch_model.safetensors", "*/model.safetensors"), ("*.fp16.safetensors",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_LICENCES = (
    (
        ("apple/*starflow*", "starflow_3b*", "starflow-v_7b*", "apple-amlr"),
        "Apple Machine Learning Research Model licence: for research only, no commercial use, derived models included",
    ),
    (
        ("stabilityai/stable-video-diffusion*", "stable-video-diffusion*"),
        "Stability AI's stable-video-diffusion-community licence (earlier revisions: non-commercial); "
        "commercial use has conditions, see the model card",
    ),
    (("wan-ai/*", "wan2.2_vae*"), "Apache-2.0 (Wan-AI)"),
    (("google/flan-t5*",), "Apache-2.0 (Google)"),
    (("stabilityai/sd-vae-ft-*",), "MIT (Stability AI)"),
)


def packaged() -> tuple[str, ...]:
    """Names of the models that ship in the package."""
    return tuple(sorted(path.parent.name for path in PACKAGED.glob("*/config.json")))


def resolve(name_or_path: str | Path, half: bool = False) -> Path:
    """Find a model: a packaged name, a local folder, a checkpoint file, or a Hugging Face id `org/name` (fetched if needed).

    Args:
        half: weights in half precision are enough, where a repository has both.

    Returns:
        The folder of the model, or the checkpoint file.

    Raises:
        ValueError: nothing of that name, or it cannot be fetched; names what is at hand.
    """
    name = str(name_or_path)
    if name in packaged():
        return PACKAGED / name
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if isinstance(name_or_path, str) and (name in NAMES or _HUB_ID.fullmatch(name)):
        return fetch(NAMES.get(name, name), half)
    known = ", ".join(packaged()) or "none"
    raise ValueError(
        f"{name!r}: unknown model; give a packaged name ({known}), one that is fetched ({', '.join(NAMES)}), an existing folder or "
        "checkpoint file, or a Hugging Face id org/name"
    )


def fetch(source: str, half: bool = False) -> Path:
    """Folder of a Hugging Face repository, `org/name` or `org/name:subfolder`, downloaded or from the cache.

    Of Stable Video Diffusion, whose weights are there four times, once: in full precision, or with `half` in half.

    Raises:
        ValueError: it is not there, needs permission, the network is not reachable, or it holds only pickled checkpoints.
    """
    from huggingface_hub import snapshot_download

    name, _, subfolder = source.partition(":")
    if fnmatch(name.lower(), "apple/*starflow*"):
        raise ValueError(f"{name}: holds reference checkpoints (.pth); download the file and run: reelflow models convert FILE.pth")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in FILES]
    twice: dict[str, Any] = {"ignore_patterns": [*_ORIGINAL, *(_FULL if half else _HALF)]} if name.lower().startswith(NAMES["svd"]) else {}
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **twice)) / subfolder
    except Exception as error:  # the library's errors share no base class: HTTP, offline, cache, validation
        reason = type(error).__name__
        raise ValueError(f"{source}: cannot be fetched from Hugging Face ({reason}); check name, network and access rights") from error
    if not any(folder.glob("**/*.json")):
        raise ValueError(f"{source}: nothing to load there; expected configurations and safetensors files")
    return folder


def part_folder(folder: str | Path, part: str, parts: Mapping[str, str]) -> Path:
    """Folder of a model's part (`vae`, `text_encoder`, `tokenizer`): inside the model's own folder, or where `parts` of its
    `config.json` (ModelConfig.parts) says, fetched if needed.

    Raises:
        ValueError: neither is there.
    """
    own = Path(folder) / part
    if own.is_dir():
        return own
    if part not in parts:
        raise ValueError(f"{folder}: has no {part}/ and its config.json names no source for it under parts")
    return fetch(parts[part])


def licence_notice(source: str) -> str | None:
    """Licence of known published weights in one line, None for others.

    Args:
        source: a Hugging Face id (`:subfolder` allowed), a licence tag (`ModelConfig.licence`), or a checkpoint's path.

    Example:
        >>> licence_notice("stabilityai/sd-vae-ft-ema")
        'stabilityai/sd-vae-ft-ema: MIT (Stability AI)'
    """
    name = source.partition(":")[0].lower()
    for patterns, notice in _LICENCES:
        if any(fnmatch(candidate, pattern) for pattern in patterns for candidate in (name, Path(name).name)):
            return f"{source}: {notice}"
    return None

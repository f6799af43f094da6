"""Weights on disk: safetensors in and out, strictly.

A model folder holds `config.json` (ModelConfig), `transformer/config.json` (FlowConfig) with `model.safetensors`, or
shards `model-00001-of-000NN.safetensors` and their `model.safetensors.index.json` (the Hugging Face convention), and
`vae/`, `text_encoder/`, `tokenizer/`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SHARD_BYTES = 1_000_000_000
"""Default size of one safetensors file."""


class MappedWeights(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, mapped from disk when asked for (CPU, no copy until written to).

    Args:
        files: tensor name → the file that holds it.
        source: what error messages call it.
    """

    def __init__(self, files: Mapping[str, Path], source: str):
        self._files, self.source = dict(files), source
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the weights are incomplete, fetch or convert the model again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({_line(error)}); fetch or convert the model again") from None


def _names(path: Path) -> list[str]:
    return list(_open(path).keys())


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_weights(source: str | Path, stem: str = "model") -> MappedWeights:
    """Map the weights of a folder (one file, or shards with an index) or of one `.safetensors` file; nothing is read yet.

    Args:
        source: a folder with `{stem}.safetensors` or `{stem}.safetensors.index.json`, or a safetensors file.
        stem: the files' name; diffusers' parts use `diffusion_pytorch_model`.

    Raises:
        ValueError: no weights there, a shard is missing or unreadable, or the index and the shards disagree.
    """
    source = Path(source)
    single = source / f"{stem}.safetensors" if source.is_dir() else source
    if single.is_file():
        return MappedWeights(dict.fromkeys(_names(single), single), str(source))
    index = source / f"{stem}.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{source}: no weights here; expected {single.name} or {index.name}")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: source / Path(file).name for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards ({_line(error)})") from None
    held = {name: path for path in sorted(set(files.values())) for name in _names(path)}
    if held != files:
        wrong = sorted(name for name in held.keys() | files.keys() if held.get(name) != files.get(name))
        raise ValueError(f"{index}: disagrees with its shards about {len(wrong)} tensors ({few(wrong)})")
    return MappedWeights(files, str(source))


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` file, mapped from disk. Only tensors are ever unpickled (`weights_only`); no code in the file runs.

    Raises:
        ValueError: missing, unreadable, a pickle that is not a flat dictionary of tensors, or in the format before
            torch 1.6, which cannot be mapped.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = "it is damaged, no checkpoint, holds more than tensors, or is in the format before torch 1.6"
        raise ValueError(f"{path}: cannot be read as weights; {reason} ({type(error).__name__})") from None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    odd = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise ValueError(f"{path}: not a flat dictionary of tensors; {len(odd)} entries are something else ({few(odd)})")
    return dict(state)


def few(names: list[str], most: int = 3) -> str:
    """The first few names, for a message in one line."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def require_match(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: in one line, how many tensors are missing, extra or misshaped, with the first few of each.
    """
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    wrong = [
        f"{name} {tuple(given[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    problems = [
        f"{len(names)} {what} ({few(names)})" for what, names in (("missing", missing), ("extra", extra), ("misshaped", wrong)) if names
    ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit the configuration: {'; '.join(problems)}")


def load_into(
    module: nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    device: str | torch.device | Callable[[str], str | torch.device] | None = None,
    dtype: torch.dtype | Literal["declared"] | None = None,
    *,
    finite: bool = False,
    after: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Fill a module's parameters and buffers, strictly.

    A module built on the `meta` device takes the tensors themselves (no second copy; on CPU in their stored precision
    they stay mapped from disk), any other one is copied into.

    Args:
        weights: a folder or file for `read_weights`, or a mapping name → tensor.
        device: where the module goes, or, of a `meta` module, each tensor by its name; None: where it is (a `meta` module: CPU).
        dtype: precision of floating-point values; None: as stored (`meta`) or as the module has it; "declared": each as the
            `meta` module has it, read from disk straight into that.
        finite: also refuse tensors with NaN or infinity.
        after: of a `meta` module, called with the name of each part, and the part, as soon as its own tensors are there.

    Raises:
        ValueError: missing, extra, misshaped or, if asked, non-finite tensors, in one line.
    """
    if not isinstance(weights, Mapping):
        weights = read_weights(weights)
    source = getattr(weights, "source", "weights")
    current = module.state_dict()
    require_match({n: tuple(t.shape) for n, t in current.items()}, {n: tuple(t.shape) for n, t in weights.items()}, source)
    if finite:
        require_finite(weights, source)
    assign = any(tensor.is_meta for tensor in current.values())

    def ready(name: str, tensor: Tensor) -> Tensor:
        kind = current[name].dtype if dtype == "declared" else dtype
        return tensor.to(device=device(name) if callable(device) else device, dtype=kind if tensor.is_floating_point() else None)

    if assign:
        for name, part in module.named_modules():
            prefix = name + "." if name else ""
            own = {key: ready(prefix + key, weights[prefix + key]) for key in part.state_dict() if "." not in key}
            part.load_state_dict(own, strict=False, assign=True)
            if after is not None:
                after(name, part)
        assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer outside the state dict is still on meta"
    else:
        assert not callable(device)
        assert after is None
        module.to(device=device, dtype=None if dtype == "declared" else dtype)
        module.load_state_dict(dict(weights))


def require_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError naming the tensors that hold NaN or infinity."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(torch.stack(torch.aminmax(tensor.float()))).all()]
    if bad:
        raise ValueError(f"{source}: {len(bad)} tensors hold NaN or infinity ({few(bad)}); the checkpoint is damaged")


def save_weights(state: Mapping[str, Tensor], folder: str | Path, max_shard_bytes: int = SHARD_BYTES, stem: str = "model") -> None:
    """Write a state dict as one safetensors file, or as shards with an index where it exceeds `max_shard_bytes`.

    Every file is written under a temporary name and renamed; the index comes last, older weights are removed after it.

    Raises:
        ValueError: the folder cannot be written, or the disk is full.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    write_shards(sizes, lambda names: {name: state[name] for name in names}, Path(folder), max_shard_bytes, stem)


def write_shards(
    sizes: Mapping[str, int],
    read: Callable[[list[str]], dict[str, Tensor]],
    folder: Path,
    max_shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write tensors shard by shard, holding one shard at a time.

    Args:
        sizes: name → bytes, in the order they are written.
        read: the tensors of the names it is given; called once per shard.
        progress: called with (bytes written, bytes in all) after each shard.
    """
    shards = _plan(sizes, max_shard_bytes)
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [f"{stem}.safetensors"]
    done, total = 0, sum(sizes.values())
    for file, names in zip(files, shards, strict=True):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in read(names).items()}
        with written(folder / file) as partial:
            save_file(tensors, partial, {"format": "pt"})
        del tensors
        done += sum(sizes[name] for name in names)
        if progress:
            progress(done, total)
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        with written(index) as partial:
            partial.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1), encoding="utf-8")
        files.append(index.name)
    for old in [*folder.glob(f"{stem}-*-of-*.safetensors"), folder / f"{stem}.safetensors", index]:
        if old.name not in files:
            old.unlink(missing_ok=True)


def _plan(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names per shard, in order, each shard at most `most` bytes; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to it when the block succeeds. Raises ValueError where writing fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # safetensors makes files for their owner alone
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({_line(error)}); check permissions and free space") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a temporary sibling, renamed to `path` when the block succeeds and
    removed when it does not (an error, Ctrl-C).

    Raises:
        ValueError: `path` exists and is not empty, or cannot be made.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path}: exists already; choose another folder or remove it first")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made ({error.strerror}); choose another folder") from None
    try:
        yield partial
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

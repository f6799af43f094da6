"""Checkpoints of a run: written in the background, whole or not there at all, readable by any number of ranks.

    checkpoints/step-00000200/shard-0000R-….safetensors     every rank's part (torch.distributed.checkpoint)
                              run.json                      step, settings, and the size of every file

A checkpoint is written into a hidden folder beside its place and renamed when all ranks are done and all bytes are on the
disk. The latest is the last one whose files have the sizes that its `run.json` says. Several machines need a folder they share.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from reelflow.training.parallel import Ranks

State = dict[str, dict[str, Tensor]]
"""Tensors by kind and name; in the files `KIND.NAME`."""


class Checkpoints:
    """The folder `checkpoints` of a run.

    Args:
        keep: how many stay.
        about: settings that have to be the same for a checkpoint to be read again.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks, about: Mapping[str, Any]):
        self.folder, self.keep, self.ranks, self.about = folder / "checkpoints", keep, ranks, dict(about)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        self._stager: DefaultStager | None = None
        # torch notes that one process is one process; catching it where it is said, in a thread, would change filters for all
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if ranks.first:
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)

    # --- writing

    def save(self, step: int, state: State) -> None:
        """Copy the state and write it in the background. Waits for a checkpoint that is still being written."""
        self.wait()
        if self._stager is None:
            cuda = self.ranks.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(cuda, False, False, False))
        copy = self._stager.stage(state)
        self._writing = step, self._worker.submit(self._write, step, copy)

    def check(self) -> bool:
        """Whether nothing is being written any more; says, in one line, what could not be written."""
        if self._writing is None:
            return True
        step, writing = self._writing
        if not writing.done():
            return False
        self._writing = None
        if error := writing.exception():
            if self.ranks.first:
                warnings.warn(f"step {step}: {self.failure(error)}", UserWarning, stacklevel=2)
            self.failed, self.why = step, reason(error)
        return True

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing[1].exception()
            self.check()

    failed: int | None = None
    why = ""
    """The step whose checkpoint could not be written last, and the error."""

    def failure(self, error: BaseException) -> str:
        good = self.latest()
        stays = f"that of step {step_of(good)} stays good" if good else "there is none before it"
        return f"the checkpoint could not be written ({reason(error)}); {stays}; free space under {self.folder}"

    def close(self) -> None:
        """Wait, and stop the background."""
        self.wait()
        self._worker.shutdown()
        if self._stager is not None:
            self._stager.close()

    def _write(self, step: int, state: Any) -> None:
        place = self.folder / f"step-{step:08d}"
        partial = place.with_name(f".{place.name}")
        try:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True, exist_ok=True)  # another rank may have made it between these lines
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(state, storage_writer=writer, process_group=self.ranks.files, no_dist=self.ranks.files is None)
            if self.ranks.first:
                files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
                with (partial / "run.json").open("w", encoding="utf-8") as file:
                    json.dump({"step": step, "ranks": self.ranks.count, "about": self.about, "files": files}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
                sync_folder(self.folder)
                for old in self.whole()[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    # --- reading

    def whole(self) -> list[Path]:
        """Checkpoints all of whose files are as long as they were, oldest first."""
        return [path for path in sorted(self.folder.glob("step-*")) if is_whole(path)]

    def latest(self) -> Path | None:
        found = self.whole()
        return found[-1] if found else None

    def find(self) -> Path | None:
        """The latest checkpoint, the same on all ranks; says so where a later one is not whole.

        Raises:
            ValueError: it is of a run with other settings.
        """
        found = self.latest()
        torn = [path for path in sorted(self.folder.glob("step-*")) if found is None or path > found]
        if torn and self.ranks.first:
            instead = f"going on from {found.name}" if found else "beginning anew"
            warnings.warn(f"{torn[-1]}: not whole; {instead}", UserWarning, stacklevel=2)
        name = self.ranks.agree(found.name if found else None)
        if name is None:
            return None
        path = self.folder / name
        about = json.loads((path / "run.json").read_text(encoding="utf-8"))["about"]
        for key, value in self.about.items():
            if about.get(key) != value:
                raise ValueError(f"{path}: of a run with {key} = {about.get(key)}, now {value}; give another folder or the same setting")
        return path

    def sizes(self, path: Path) -> dict[str, torch.Size]:
        """Name → shape of what a checkpoint holds. Raises ValueError for a damaged one."""
        try:
            metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({reason(error)}); remove it to go on from the one before") from None
        return {name: found.size for name, found in metadata.items()}  # type: ignore[union-attr]  # tensors only

    def load(self, path: Path, state: State) -> None:
        """Fill the tensors of `state`, each as it is sharded here."""
        read_into(path, state, self.ranks)


def read_into(folder: Path, state: State | dict[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors, each as it is sharded, from the safetensors files of a folder. Raises ValueError where they are damaged."""
    try:
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(state, storage_reader=reader, process_group=ranks.files, no_dist=ranks.files is None)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        raise ValueError(f"{folder}: cannot be read ({reason(error)}); it is damaged") from None


def is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / "run.json").read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def reason(error: BaseException) -> str:
    """The first words of an error, of that of the first rank that had one."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:160] or type(error).__name__


def sync_folder(folder: Path) -> None:
    """Have the names in it on the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Weights on disk: what is written comes back, anything that does not fit is one line, nothing half-written stays."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reelflow.adapters.checkpoint import load_into, new_folder, read_pickle, read_weights, save_weights, written


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("most", [10**9, 64])
def test_round_trip_whole_and_in_shards(tmp_path: Path, most: int) -> None:
    state = net().state_dict()
    save_weights(state, tmp_path, most)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (most == 64)
    weights = read_weights(tmp_path)
    assert sorted(weights) == sorted(state)
    assert len(weights) == len(state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


def test_shards_follow_the_hugging_face_convention(tmp_path: Path) -> None:
    save_weights(net().state_dict(), tmp_path, 64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in net().state_dict().values())


def test_saving_again_leaves_no_older_files(tmp_path: Path) -> None:
    state = net().state_dict()
    for most, count in ((64, None), (10**9, 1), (64, None)):
        save_weights(state, tmp_path, most)
        names = {path.name for path in tmp_path.iterdir()}
        assert count is None or names == {"model.safetensors"}
        assert not any(name.endswith(".partial") for name in names)
        assert set(read_weights(tmp_path)) == set(state)


def test_meta_module_takes_the_tensors_themselves(tmp_path: Path) -> None:
    source = net()
    save_weights(source.state_dict(), tmp_path)
    with torch.device("meta"):
        module = net()
    load_into(module, tmp_path, "cpu", torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in module.parameters())
    x = torch.randn(5, 3)
    torch.testing.assert_close(module(x.bfloat16()).float(), source(x), atol=0.05, rtol=0.05)
    with torch.device("meta"):
        module = net()
    load_into(module, tmp_path)
    assert torch.equal(module(x), source(x))


def test_tensors_are_read_into_the_precision_that_is_declared(tmp_path: Path) -> None:
    source = net()
    save_weights(source.state_dict(), tmp_path)
    with torch.device("meta"):
        module = net()
        module[0].to(torch.bfloat16)
    load_into(module, tmp_path, "cpu", "declared")
    kinds = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.startswith("0.")} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if not name.startswith("0.")} == {torch.float32}


def test_other_modules_are_copied_into() -> None:
    module, source = net(), net()
    before = list(module.parameters())
    load_into(module, source.state_dict())
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert torch.equal(module[0].weight, source[0].weight)
    assert module[0].weight is not source[0].weight


def test_every_misfit_is_named_with_counts() -> None:
    state = net().state_dict()
    state["0.weight"] = torch.zeros(4, 5)
    state["extra.a"] = state.pop("1.weight")
    state["extra.b"] = state.pop("1.bias")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_into(net(), state)
    text = one_line(error)
    for part in ("2 missing (1.weight, 1.bias)", "2 extra (extra.a, extra.b)", "1 misshaped (0.weight (4, 5) instead of (4, 3))"):
        assert part in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damage_is_refused_if_asked(value: float) -> None:
    state = net().state_dict()
    state["2.bias"] = torch.tensor([0.0, value])
    load_into(net(), state)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity \(2.bias\)"):
        load_into(net(), state, finite=True)


class Harmful:
    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


def test_pickles_that_are_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"{name}.pth" for name in ("code", "object", "nested", "empty", "text", "list", "legacy")}
    files["code"].write_bytes(pickle.dumps(Harmful()))
    torch.save({"a": Harmful()}, files["object"])
    torch.save({"model": net().state_dict()}, files["nested"])
    torch.save({}, files["empty"])
    files["text"].write_text("no weights")
    torch.save([torch.zeros(1)], files["list"])
    torch.save(net().state_dict(), files["legacy"], _use_new_zipfile_serialization=False)
    for path in (*files.values(), tmp_path / "missing.pth"):
        with pytest.raises(ValueError, match=path.name) as error:
            read_pickle(path)
        one_line(error)
    assert "must never run" not in capsys.readouterr().out


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights here"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="disagrees with its shards about 2 tensors"):
        read_weights(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    save_weights(net().state_dict(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_weights(tmp_path)


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), new_folder(target) as folder:
            (folder / "half").write_text("x")
            raise failure
        assert list(target.parent.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.parent.rglob("*")] == ["model", "whole"]
    with pytest.raises(ValueError, match="exists already"), new_folder(target):
        pass


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be made"), new_folder(tmp_path / "file" / "model"):
        pass


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write fails in the middle."""
    code = f"""
import resource, torch
from reelflow.adapters.checkpoint import save_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
try:
    save_weights({{"a": torch.zeros(10_000)}}, {str(tmp_path)!r})
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model.safetensors: cannot be written" in result.stdout
    assert result.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_for_everyone_the_umask_allows(tmp_path: Path) -> None:
    with written(tmp_path / "z.safetensors") as temporary:
        save_file({"z": torch.zeros(1)}, temporary)
    assert (tmp_path / "z.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

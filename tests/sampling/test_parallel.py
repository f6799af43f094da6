"""Several processes make what one makes: guidance by branches, the deep block by tensor ranks, frames of the shallow blocks shared out.

Shapes are those of `ranks.py`, which runs as the processes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from reelflow.adapters.torchrun import counts, own_device, ranks
from reelflow.config import FlowConfig
from reelflow.flow import StarFlow
from reelflow.flow.parallel import Ranks

Found = dict[str, Tensor]
SMALL: dict[str, Any] = {"channels": 3, "width": 32, "deep_width": 64, "layers": (1, 1), "head_dim": 16, "position_span": 4.0}
WORKER = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Found]:
    """What each of one, two and four processes found: (processes, rank) → case → values."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, str(WORKER), str(folder)], check=False, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    return {(count, rank): load_file(folder / f"{count}-{rank}.safetensors") for count in (1, 2, 4) for rank in range(count)}


@pytest.mark.slow
@pytest.mark.timeout(600)  # processes wait for each other: long where others use the cores, too
@pytest.mark.parametrize("count", [2, 4])
def test_together_as_alone(found: dict[tuple[int, int], Found], count: int) -> None:
    """Every way to sample, and the forward map: the values of one process, and bitwise the same ones on every rank."""
    alone = found[1, 0]
    for name, values in found[count, 0].items():
        for rank in range(count):
            assert torch.equal(found[count, rank][name], values), f"{name}: rank {rank} has other values"
        if not name.endswith("weights"):
            torch.testing.assert_close(values, alone[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_samples_are_what_they_should_be(found: dict[tuple[int, int], Found]) -> None:
    """A sample with a ring gives its noise back, with a start token and without; guidance does something."""
    for model in ("plain", "options"):
        assert found[1, 0][f"{model}: certificate"].max() < 1e-4
    plain = {name.removeprefix("plain: "): values for name, values in found[1, 0].items() if name.startswith("plain: ")}
    assert (plain["no guidance"] - plain["beyond the window"][:, :1]).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tensor_ranks_hold_their_share(found: dict[tuple[int, int], Found]) -> None:
    """Of the layers' weights: two ranks without text half, four with text half as well, for the other two are a branch."""
    for count, model in ((2, "no text"), (4, "options")):
        part, whole = int(found[count, 0][f"{model}: weights"]), int(found[1, 0][f"{model}: weights"])
        assert whole / 2 <= part < 0.51 * whole


def test_which_numbers_of_processes_can_share_a_model() -> None:
    """Branches of guidance × what divides the heads, those of the keys too."""
    assert counts(FlowConfig(**SMALL, text_tokens=4, text_dim=6)) == [1, 2, 4, 8]
    assert counts(FlowConfig(**SMALL, text_tokens=4, text_dim=6, num_kv_heads=2)) == [1, 2, 4]
    assert counts(FlowConfig(**SMALL)) == [1, 2, 4]
    assert counts(FlowConfig(**SMALL | {"deep_width": 96})) == [1, 2, 3, 6]


@pytest.fixture
def crowd() -> Iterator[Callable[[int], None]]:
    """`crowd(3)`: this process believes to be one of three."""
    yield lambda count: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    dist.destroy_process_group()


def test_other_numbers_are_refused(crowd: Callable[[int], None]) -> None:
    crowd(3)
    with pytest.raises(ValueError, match=r"^3 processes cannot share this model; start 1, 2, 4 or 8 of them \(torchrun"):
        ranks(FlowConfig(**SMALL, text_tokens=4, text_dim=6), "cpu")


def test_layers_are_shared_out_before_they_are_quantised(crowd: Callable[[int], None]) -> None:
    """torchao's weights cannot be cut any more; two processes need not."""
    crowd(4)
    config = FlowConfig(**SMALL, text_tokens=4, text_dim=6)
    flow = StarFlow(config)
    quantize_(flow.deep_block.layers, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="^quantised layers cannot be shared out; use precision bfloat16, or 2 processes"):
        flow.share(ranks(config, "cpu"))
    assert StarFlow(config).share(Ranks(2, 1, 0)).ranks.size == 2


def test_all_ask_for_the_same(crowd: Callable[[int], None]) -> None:
    """The other one's request reads as 0 here."""
    crowd(2)
    with pytest.raises(ValueError, match="^the processes ask for different clips"):
        Ranks(2, 1, 0).agree(5, "a ball")


def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda"
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (own_device("cuda"), own_device("cpu"), own_device("toaster")) == ("cuda:1", "cpu", "toaster")
    for device, words in (("cuda:0", "same for all processes"), ("mps", "same for all processes")):
        with pytest.raises(ValueError, match=words):
            own_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="no GPU of its own, there are 1"):
        own_device("cuda")


def test_shares_of_rows_cover_them_all_the_first_rank_first() -> None:
    for rows in range(9):
        parts = [range(rows)[Ranks(2, 2, rank).part(rows)] for rank in range(4)]
        assert [row for part in parts for row in part] == list(range(rows))
        assert len(parts[0]) == max(map(len, parts))

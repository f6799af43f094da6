"""Training that starts from a model: of all its weights, of its text encoder too, or of adapters only.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reelflow
from reelflow.adapters import lora
from reelflow.adapters.checkpoint import read_weights
from reelflow.adapters.lora import Lora
from reelflow.adapters.text import TextEncoder, load_text_encoder
from reelflow.clip import Clip
from reelflow.training.batches import Batch
from reelflow.training.config import TrainConfig
from reelflow.training.export import averaged, export, flow_state
from reelflow.training.flow import FlowObjective
from reelflow.training.run import write_result
from reelflow.training.samples import write_samples
from reelflow.training.trainer import Trainer

model_of = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "tiny.py"))
Text = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["Text"]
STAGES = [{"steps": 4, "buckets": [{"task": "generate", "frames": 3, "batch": 2}]}]
SETTINGS: dict[str, Any] = {
    "latents": "x", "stages": STAGES, "precision": "float32", "lr": 1e-2, "denoiser_lr": 1e-2, "warmup": 0, "grad_skip": False, "ema": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of["write_tiny"](tmp_path_factory.mktemp("model") / "tiny")


def make(folder: Path, model: Path, text: TextEncoder | None = None, **values: Any) -> Trainer:
    config = TrainConfig.parse({"init": str(model)} | SETTINGS | values)

    def source(step: int) -> Batch:
        return Batch(torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(step)), ["a red ball", ""])

    torch.manual_seed(1)
    return Trainer(config, source, FlowObjective(config, text or Text(width=16, tokens=model_of["TOKENS"])), folder)


def test_a_run_begins_with_the_weights_of_its_model(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, model, about={"name": "mine"}, flow={"noise_std": 0.4})
    assert (trainer.config.about.name, trainer.config.about.fps, trainer.config.flow.noise_std) == ("mine", 8, 0.4)
    stored = read_weights(model / "transformer")
    assert {f"flow.{name}" for name in stored} == set(trainer.weights)
    assert all(torch.equal(trainer.weights[f"flow.{name}"], stored[name]) for name in stored)
    trainer.train_step()
    assert all(not torch.equal(trainer.weights[f"flow.{name}"], stored[name]) for name in stored)


def test_an_adapter_in_its_folder_is_a_part_of_the_model(model: Path, tmp_path: Path) -> None:
    """Of what is trained on, and of what stays as it is beside adapters."""
    folder, layer = tmp_path / "adapted", "deep_block.layers.1.attention.proj"
    shutil.copytree(model, folder)
    rows, columns = read_weights(model / "transformer")[f"{layer}.weight"].shape
    tensors = {layer + lora.DOWN: torch.ones(1, columns), layer + lora.UP: torch.ones(rows, 1)}
    lora.save(folder / "transformer" / lora.OWN, tensors, {"rank": 1, "alpha": 0.5, "model": "tiny", "revision": "1"})
    trainer, adapting = make(tmp_path / "a", folder), make(tmp_path / "b", folder, lora={"rank": 2})
    base = dict(adapting.objective.flow.named_parameters())[f"{layer}.base_layer.weight"]
    stored = read_weights(model / "transformer")
    assert torch.equal(trainer.weights[f"flow.{layer}.weight"], stored[f"{layer}.weight"] + 0.5)
    assert torch.equal(base, stored[f"{layer}.weight"] + 0.5)
    assert all(torch.equal(trainer.weights[f"flow.{name}"], stored[name]) for name in stored if name != f"{layer}.weight")


def test_weights_that_do_not_fit_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformer: the weights do not fit the configuration: \d+ misshaped \(shallow_blocks") as error:
        make(tmp_path, model, flow={"width": 48})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'nowhere': unknown model"):
        TrainConfig.parse({"init": "nowhere"} | SETTINGS)


def test_the_text_encoder_of_a_model_is_trained_only_if_asked(model: Path, tmp_path: Path) -> None:
    for asked in (False, True):
        trainer = make(tmp_path / str(asked), model, train_text=asked)
        before = trainer.objective.text.model.weight.clone()
        trainer.train_step()
        assert torch.equal(before, trainer.objective.text.model.weight) is not asked
        assert torch.equal(trainer.objective.averaged_text(trainer.averaged()).model.weight, trainer.average.get("text.weight", before))


def test_adapters_begin_as_nothing_and_are_all_that_moves(model: Path, tmp_path: Path) -> None:
    trainer, plain = make(tmp_path / "lora", model, lora={"rank": 2}), make(tmp_path / "plain", model)
    base = {name: p.clone() for name, p in trainer.objective.flow.named_parameters() if ".lora_" not in name}
    assert trainer.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-6)
    assert set(trainer.weights) == {f"flow.{name}" for name, _ in trainer.objective.flow.named_parameters() if ".lora_" in name}
    assert len(trainer.weights) == 2 * 4 * (1 + 1 + 2 + 1)  # A and B of four matrices in each layer, the denoiser's too
    assert all(torch.equal(p, base[name]) for name, p in trainer.objective.flow.named_parameters() if ".lora_" not in name)
    trainer.train_step()
    assert all(p.abs().sum() > 0 for name, p in trainer.weights.items() if ".lora_B." in name)


def test_the_file_of_a_run_gives_its_model(model: Path, tmp_path: Path) -> None:
    """Loaded into the model it was trained on, and as `averaged` shows it while it trains: the same weights, to bfloat16's rounding."""
    lora = {"rank": 2, "alpha": 3.0, "targets": ["deep_block.*.qkv", "deep_block.*.up"]}
    trainer = make(tmp_path, model, lora=lora, about={"name": "heart"})
    trainer.run()
    path = write_result(trainer)
    assert path == tmp_path / "heart.safetensors"
    about = Lora.open(path).about
    assert about == lora | {"name": "heart", "model": "tiny", "revision": "1"}
    assert Lora.open(path).layers == [f"deep_block.layers.{i}.{part}" for i in (0, 1) for part in ("attention.qkv", "mlp.up")]
    pipe = reelflow.load(model, "cpu")
    pipe.load_lora(path)
    found, shown = flow_state(trainer), averaged(trainer)
    assert shown is not None
    for name, p in pipe.flow.named_parameters():
        torch.testing.assert_close(p, found[name], atol=2e-3, rtol=1e-2)
        assert torch.equal(dict(shown.flow.named_parameters())[name], found[name])
    assert make(tmp_path, model, lora=lora).step == 4


def test_adapters_do_not_go_on_from_another_revision(model: Path, tmp_path: Path) -> None:
    """They are changes of weights that a checkpoint does not hold; a run of all weights has its own."""
    other = tmp_path / "model"
    shutil.copytree(model, other)
    make(tmp_path / "adapters", other, lora={"rank": 2}).run()
    make(tmp_path / "all", other).run()
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"revision": "2"}), encoding="utf-8")
    assert make(tmp_path / "all", other).step == 4
    with pytest.raises(ValueError, match=r"of a run with revision of init = 1, now 2; give another folder or the same setting"):
        make(tmp_path / "adapters", other, lora={"rank": 2})


def test_samples_of_a_run_are_clips_of_its_averaged_weights_and_leave_it_as_it_is(model: Path, tmp_path: Path) -> None:
    prompts = ["a red ball moves right", "a blue box"]
    text = load_text_encoder(model / "text_encoder", model / "tokenizer", model_of["TOKENS"], "cpu", torch.float32)
    trainer = make(tmp_path / "shown", model, text, sample_every=2, sample_prompts=prompts)
    plain = make(tmp_path / "plain", model, text)
    trainer.run(on_sample=write_samples)
    plain.run()
    assert all(torch.equal(p, plain.weights[name]) for name, p in trainer.weights.items())
    names = [f"{step:06d}-{index}" for step in (2, 4) for index in (0, 1)]
    samples = tmp_path / "shown" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == [f"{name}.{kind}" for name in names for kind in ("mp4", "png")]
    pipe = averaged(trainer)
    assert pipe is not None
    clip, made = Clip.open(samples / "000004-1.mp4"), pipe.generate("a blue box", seed=0)
    assert len(clip) == len(made)
    assert clip.metadata["prompt"] == "a blue box"


def test_in_bfloat16_the_weights_that_stay_are_kept_so(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, model, lora={}, precision="bfloat16")
    named = trainer.objective.flow.named_parameters()
    kinds = {name: p.dtype for name, p in named if ".layers.0.mlp.up." in name and name.startswith("deep_block")}
    assert {name.partition("up.")[2]: str(kind) for name, kind in kinds.items()} == {
        "base_layer.weight": "torch.bfloat16", "base_layer.bias": "torch.bfloat16",
        "lora_A.default.weight": "torch.float32", "lora_B.default.weight": "torch.float32",
    }  # fmt: skip
    trainer.train_step()


def test_a_whole_model_is_written_at_the_end(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path, model, about={"name": "mine"})
    trainer.objective.text = reelflow.load(model, "cpu").text  # a real one, which can be saved
    trainer.train_step()
    target = export(trainer, tmp_path / "model")
    pipe, wanted = reelflow.load(target, "cpu"), flow_state(trainer)
    assert pipe.about.name == "mine"
    assert all(torch.equal(p, wanted[name].bfloat16().float()) for name, p in pipe.flow.named_parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": None, "lora": {}}, "lora adapts a model; say which one with init"),
        ({"lora": {}, "train_text": True}, "lora leaves the text encoder as it is"),
        ({"lora": {}, "optimizer": "muon"}, "optimizer = muon does not go with lora; use adamw"),
        ({"lora": {"rank": 0}}, "lora.rank = 0"),
        ({"noise_range": [0.3, 0.5]}, "noise_range needs about.prompt.noise = true"),
        ({"about": {"prompt": {"noise": True}}, "noise_range": [0.5, 0.3]}, "noise_range = [0.5, 0.3]: give the smaller one first"),
        ({"latents": None}, "nothing to train on"),
    ],
)
def test_keys_that_do_not_go_together(model: Path, change: dict[str, Any], words: str) -> None:
    whole = TrainConfig.parse({"init": str(model)} | SETTINGS).model_dump(mode="json", exclude={"init"}, exclude_none=True)
    values = {key: value for key, value in ({"init": str(model)} | SETTINGS | change).items() if value is not None}
    with pytest.raises(ValueError, match="configuration: ") as error:
        TrainConfig.parse(values if "init" in values else whole | change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_targets_that_mean_no_layer(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.targets: no linear layer is named 'deep\.\*'; such as: "):
        make(tmp_path, model, lora={"targets": ["deep.*"]})

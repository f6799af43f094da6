"""Finding models without a network, and saying licences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelflow.adapters import hub
from reelflow.adapters.hub import licence_notice, part_folder, resolve


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "weights"
    for name in ("mini", "other"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    (root / "unfinished").mkdir()
    monkeypatch.setattr(hub, "PACKAGED", root)
    return root


def test_packaged_names_come_first(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert hub.packaged() == ("mini", "other")
    assert resolve("mini") == packaged / "mini"
    assert resolve("./mini") == Path("mini")


def test_folders_and_files(packaged: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    file.write_text("")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(file) == file


@pytest.mark.parametrize("name", ["maxi", "/no/such/folder", "a/b/c", "", "org/na me"])
def test_unknown_models_name_the_packaged_ones(packaged: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown model; give a packaged name \(mini, other\)") as error:
        resolve(name)
    assert "\n" not in str(error.value)
    assert repr(name) in str(error.value)


def test_remote_names_without_network(packaged: Path) -> None:
    with pytest.raises(ValueError, match="nobody/nothing: cannot be fetched") as error:
        resolve("nobody/nothing")
    assert "\n" not in str(error.value)


def test_reference_checkpoints_are_converted_not_fetched(packaged: Path) -> None:
    with pytest.raises(ValueError, match="reelflow models convert"):
        resolve("apple/starflow")


def test_only_weights_and_configurations_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.fetch("org/name") == tmp_path
    assert hub.fetch("org/part:vae") == tmp_path / "vae"
    assert "*.safetensors" in asked["org/name"]
    assert all(pattern.startswith("vae/") for pattern in asked["org/part"])
    assert not any(pattern.endswith((".bin", ".pth", ".pt", ".ckpt", "*")) for patterns in asked.values() for pattern in patterns)
    with pytest.raises(ValueError, match="nothing to load there"):
        hub.fetch("org/other:text_encoder")


def test_parts_are_inside_or_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    assert part_folder(tmp_path, "vae", {"vae": "nobody/nothing"}) == tmp_path / "vae"
    with pytest.raises(ValueError, match="names no source"):
        part_folder(tmp_path, "tokenizer", {})
    with pytest.raises(ValueError, match="nobody/nothing: cannot be fetched"):
        part_folder(tmp_path, "tokenizer", {"tokenizer": "nobody/nothing"})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("apple/starflow", "research only"),
        ("/models/starflow-v_7B_t2v_caus_480p_v3.pth", "research only"),
        ("starflow_3B_t2i_256x256.pth", "research only"),
        ("apple-amlr", "research only"),
        ("stabilityai/stable-video-diffusion-img2vid-xt", "stable-video-diffusion-community"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers:vae", "Apache-2.0"),
        ("Wan2.2_VAE.pth", "Apache-2.0"),
        ("google/flan-t5-xl", "Apache-2.0"),
        ("stabilityai/sd-vae-ft-ema", "MIT"),
    ],
)
def test_known_licences(source: str, said: str) -> None:
    notice = licence_notice(source)
    assert notice is not None
    assert said in notice
    assert "\n" not in notice


@pytest.mark.parametrize("source", ["mini", "unknown", "Apache-2.0", "someone/starflow-like", str(Path("x") / "y")])
def test_other_weights_have_no_notice(source: str) -> None:
    assert licence_notice(source) is None


def test_every_published_configuration_has_a_notice(reference) -> None:
    for name, arguments in reference.published.items():
        for source in (name, arguments["vae"], arguments["text"]):
            assert licence_notice(source), json.dumps(source)

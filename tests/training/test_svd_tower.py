"""The small CLIP tower: it learns to tell what a picture shows, its folder loads, and a model is trained with it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reelflow.training.svd.tower as module
from reelflow.adapters.svd import CLIP_MEAN, CLIP_STD, load_part
from reelflow.data.toybox import Scene, Thing, render, sample_scene
from reelflow.pipelines.svd.picture import clip_view
from reelflow.training.svd.model import new_image_encoder
from reelflow.training.svd.tower import KNOWN, grey, main, measure, new_tower, pictures, train

tiny: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("svd_run.py")))
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "projection_dim": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "SETTINGS", SMALL)


def test_what_a_picture_shows() -> None:
    """Every word of its scene and no other, for every frame that is taken of it."""
    scene = Scene((Thing("star", "cyan", "small", "stays still", 40, 40), Thing("ball", "red", "small", "stays still", 90, 90)), "navy")
    shown = pictures([scene, sample_scene(0, 0)], frames=2)
    assert shown.pixels.shape == (4, 3, 224, 224)
    assert words_of(shown.words[1]) == {"star", "ball", "cyan", "red", "small", "navy"}
    assert torch.equal(shown.words[0], shown.words[1])
    assert not torch.equal(shown.words[1], shown.words[2])
    patch = lambda x, y: int(y * 14 / 128) * 14 + int(x * 14 / 128)  # noqa: E731
    assert words_of(shown.things[0, patch(40, 40)]) == {"star", "cyan", "small", "navy"}
    assert words_of(shown.things[0, patch(90, 90)]) == {"ball", "red", "small", "navy"}
    assert shown.on_thing[0, [patch(40, 40), patch(90, 90), patch(90, 40)]].tolist() == [True, True, False]


def test_views_are_those_that_the_pipeline_shows() -> None:
    """But for edges, which are finer where a picture is rendered at this size."""
    scene = Scene((Thing("box", "red", "large", "stays still", 64, 40),), "navy")
    small = clip_view(render([scene], 1)[0].permute(0, 3, 1, 2).float() / 127.5 - 1, CLIP_MEAN, CLIP_STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    difference = ((pictures([scene], frames=1).pixels - mean) / std - small).abs()
    assert difference.median() < 0.02
    assert difference.mean() < 0.05


def test_grey_pictures_have_no_colour_and_no_white() -> None:
    scene = Scene((Thing("box", "white", "large", "stays still", 64, 40),), "navy")
    pixels = grey(pictures([scene], frames=1).pixels)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2])
    assert pixels.max() == pytest.approx(0.8 * 240 / 255, abs=0.01)


def words_of(marks: torch.Tensor) -> set[str]:
    return {word for word, shown in zip(KNOWN, marks.tolist(), strict=True) if shown}


@torch.no_grad()
def test_the_product_is_the_convolution() -> None:
    """Of patches, whose weights a folder has as CLIP's convolution."""
    conv = new_tower().vision_model.embeddings.patch_embedding
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(conv(x), torch.nn.functional.conv2d(x, conv.weight, stride=conv.stride), atol=1e-5, rtol=1e-4)


def test_it_learns_the_same_every_time() -> None:
    (tower, _), (again, _) = (train(3, batch=2) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(tower.parameters(), again.parameters(), strict=True))


def test_it_learns() -> None:
    """Backgrounds within some steps, which is far from chance and the easiest of its words."""
    assert measure(*train(100, batch=8, rate=6e-3), "train", 32)["background"] > 0.45


def test_its_folder_is_a_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tower"
    monkeypatch.setattr(sys, "argv", ["tower", str(folder), "--steps", "2"])
    main()
    assert "held_out pairs:  shape" in capsys.readouterr().err
    config = tiny["write"](tmp_path, image_encoder=str(folder))
    beside = load_file(tmp_path / "latents" / "image_encoder" / "model.safetensors")
    given = load_part(folder, "image_encoder").state_dict()
    assert all(torch.equal(value, given[name]) for name, value in beside.items())
    assert torch.equal(new_image_encoder(config).visual_projection.weight, given["visual_projection.weight"])
    with pytest.raises(SystemExit):  # nothing is written over
        main()


def test_a_folder_without_a_tower_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_encoder: no CLIP tower in .*nothing; train one with: python -m"):
        tiny["write"](tmp_path, image_encoder=str(tmp_path / "nothing"))
    assert not (tmp_path / "latents").exists(), "nothing is half prepared"

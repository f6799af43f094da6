"""The toybox detector: rates on true renders, what it says of hand-made clips, and that it can say no."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reelflow.data.toybox import MOTIONS, Scene, Thing, canonical, render, sample_scene, scene_from_prompt, simulate
from reelflow.evaluation import motion
from reelflow.evaluation.detect import detect, matches
from reelflow.evaluation.motion import motion_of
from reelflow.evaluation.validate import degrade, validate, validate_going_on, validate_motions


def test_one_thing_is_read_from_true_renders():
    shares = validate(64, things=1, degraded=False)
    assert shares["all"] == 1


def test_two_things_are_read_from_true_renders():
    assert validate(32, things=2, degraded=False)["all"] >= 0.95


def test_one_thing_is_read_from_degraded_renders():
    shares = validate(32, things=1, degraded=True)
    assert min(shares["colour"], shares["shape"], shares["size"], shares["motion"]) >= 0.95
    assert shares["all"] >= 0.9


def test_small_frames_are_read():
    assert validate(24, things=1, degraded=False, size=64)["all"] >= 0.9


def test_what_moves_is_seen_to_go_on_late_in_long_clips() -> None:
    assert validate_going_on(32, degraded=True) == 1.0


def test_track_is_where_the_thing_is():
    for index in range(6):
        scene = replace(sample_scene(3, index, things=1), wall=None)
        seen = detect(render([scene])[0])[0]
        assert seen.track.shape == (33, 2)
        assert seen.present.all()
        assert np.abs(seen.track - simulate(scene)[:, 0]).max() < 0.7


def test_thing_behind_the_wall_is_absent_for_a_while():
    scene = next(scene for index in range(400) if (scene := sample_scene(5, index, things=1)).wall and scene.things[0].size == "small")
    scene = replace(scene, things=scene_from_prompt("a small red ball moves right on a black background", 1).things)
    scene = scene.with_thing(0, x=30.0, vx=2.5)
    seen = detect(render([scene])[0])[0]
    assert seen.motion == "moves right"
    assert 0 < (~seen.present).sum() < 25


def test_two_things_of_one_colour_are_told_apart():
    scene = scene_from_prompt("a large red ball moves right and a small red box moves left on a black background", 4)
    seen = detect(render([scene])[0], things=2)
    assert {(one.size, one.shape, one.motion) for one in seen} == {("large", "ball", "moves right"), ("small", "box", "moves left")}


@pytest.mark.parametrize("name", MOTIONS)
def test_motion_survives_a_shaky_track(name):
    rng = np.random.default_rng(0)
    for seed in range(8):
        path = simulate(scene_from_prompt(f"a red ball {name} on a black background", seed))[:, 0]
        assert motion_of(path + rng.normal(0, 0.5, path.shape), np.ones(33, bool)) == name


def test_motions_of_uneven_courses_are_named(monkeypatch):
    assert min(validate_motions(24, 2.0).values()) > 0.95
    assert min(validate_motions(24, 3.0).values()) > 0.9
    with monkeypatch.context() as changed:
        changed.setattr(motion, "UNEVEN", 0.1)
        assert validate_motions(24, 2.0)["stays still"] < 0.8
    monkeypatch.setattr(motion, "LASTING", 1)
    assert validate_motions(24, 3.0)["stays still"] < 0.7


@pytest.mark.parametrize(("share", "circles"), [(0.4, False), (0.73, True)])
def test_a_circle_is_more_than_an_arc(share, circles):
    for radius in (20, 35):
        angle = np.linspace(0, 2 * np.pi * share, 33)
        course = 64 + radius * np.stack([np.cos(angle), np.sin(angle)], -1)
        assert (motion_of(course, np.ones(33, bool)) == "circles") == circles


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a small red ball circles on a black background", "shape"),
        ("a small blue star circles on a black background", "colour"),
        ("a large red star circles on a black background", "size"),
        ("a small red star bounces on a black background", "motion"),
        ("a small red star circles on a navy background", "background"),
    ],
)
def test_each_wrong_attribute_is_noticed_alone(prompt, wrong):
    seen = detect(render([scene_from_prompt("a small red star circles on a black background", 2)])[0])
    result = matches(seen, scene_from_prompt(prompt, 0), size=True)
    assert [key for key, right in result.items() if not right] == [wrong, "all"]


def test_size_counts_only_where_asked_for():
    scene = scene_from_prompt("a small red star circles on a black background", 2)
    larger = scene_from_prompt("a large red star circles on a black background", 2)
    seen = detect(render([scene])[0])
    assert matches(seen, larger)["all"]
    assert not matches(seen, larger, size=True)["all"]


def test_nothing_is_seen_where_nothing_is():
    noise = (torch.full((17, 64, 64, 3), 60.0) + 8 * torch.randn(17, 64, 64, 3, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    for things in (1, 2):
        assert detect(noise, things) == []
    assert not any(matches([], sample_scene(0, 1)).values())


def test_order_of_two_things_does_not_matter():
    scene = Scene(
        (Thing("ball", "red", "small", "stays still", 30, 30), Thing("box", "blue", "large", "moves up", 90, 100, 0, -2)), "grey", 10.0
    )
    seen = detect(degrade(render([scene])[0], 0), things=2)
    for order in (seen, seen[::-1]):
        for things in (scene.things, scene.things[::-1]):
            assert matches(order, replace(scene, things=things), size=True)["all"], canonical(scene)
    assert not matches(seen[:1], scene)["all"]


@pytest.mark.parametrize(
    ("shape", "things", "message"),
    [((33, 128, 128, 3), 3, "things 3"), ((33, 3, 128, 128), 1, "33, 3, 128, 128"), ((4, 64, 64, 3), 1, "4, 64, 64, 3")],
)
def test_wrong_input_is_named(shape, things, message):
    with pytest.raises(ValueError, match=message):
        detect(torch.zeros(shape, dtype=torch.uint8), things)

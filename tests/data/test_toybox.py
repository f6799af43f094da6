"""Toybox: determinism, truth of captions, exact physics, pictures, edit pairs, impossible twins."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelflow.data.toybox import (
    BACKGROUNDS,
    CLIP,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    Toybox,
    Twist,
    Wall,
    canonical,
    captions,
    collate,
    edit_pair,
    impossible_twin,
    render,
    sample_scene,
    scene_from_prompt,
    simulate,
)

FEW = range(100)
STRAIGHT = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


def one(motion="moves right", x=30.0, y=64.0, vx=2.0, vy=0.0, turn=0.0, size="small", **scene):
    return Scene((Thing("ball", "red", size, motion, x, y, vx, vy, turn),), "black", **scene)


# sampling


def test_scene_depends_on_seed_and_index_alone():
    forwards = [sample_scene(3, index) for index in range(40)]
    backwards = [sample_scene(3, index) for index in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 40
    assert sample_scene(4, 0) != sample_scene(3, 0)


def test_scenes_of_today_are_the_scenes_of_tomorrow():
    """Trained models, tests and published numbers refer to scenes by (seed, index)."""
    assert canonical(sample_scene(0, 0)) == "a small cyan triangle moves up and a small red star moves down on a brown background"
    assert sample_scene(0, 1).things[0].x == pytest.approx(63.372682419209426, abs=1e-9)


def test_held_out_pairs_are_never_trained_on_and_always_tested():
    for index in range(1500):
        assert not sample_scene(0, index).held_out
    assert all(sample_scene(0, index, split="held_out").held_out for index in range(300))
    mixed = sum(sample_scene(0, index, split="any").held_out for index in range(500))
    assert 0 < mixed < 250


def test_pairs_and_motions_are_as_often_as_asked():
    asked = [sample_scene(1, index, pairs=0.6, motions=("circles", "circles", "stays still")) for index in range(600)]
    assert np.mean([len(scene.things) == 2 for scene in asked]) == pytest.approx(0.6, abs=0.05)
    things = [thing.motion for scene in asked for thing in scene.things]
    assert set(things) == {"circles", "stays still"}
    assert np.mean([motion == "circles" for motion in things]) == pytest.approx(2 / 3, abs=0.05)
    assert sample_scene(1, 0, pairs=0.25, motions=MOTIONS) == sample_scene(1, 0)


def test_every_value_occurs_and_the_shares_hold():
    scenes = [sample_scene(1, index) for index in range(1500)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {thing.motion for thing in things} == set(MOTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {thing.turn > 0 for thing in things if thing.turn} == {True, False}
    assert 0.2 < np.mean([len(scene.things) == 2 for scene in scenes]) < 0.3
    assert 0.01 < np.mean([scene.wall is not None for scene in scenes]) < 0.08
    assert {len(sample_scene(1, index, things=2).things) for index in range(20)} == {2}


def test_scene_survives_json():
    for index in range(20):
        scene = replace(impossible_twin(sample_scene(2, index), index), wall=Wall(60, 20))
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_scene(-1, 0), "seed -1"),
        (lambda: sample_scene(0, 0, split="test"), "'test'"),
        (lambda: sample_scene(0, 0, things=3), "things 3"),
        (lambda: Thing("cube", "red", "small", "circles", 0, 0), "'cube'"),
        (lambda: Scene((), "black"), "0 things"),
        (lambda: render([sample_scene(0, 0)], frames=0), "frames 0"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# words


def test_captions_are_true():
    for index in FEW:
        scene = sample_scene(5, index)
        for caption in captions(scene):
            words = caption.replace(",", "").split()
            assert [word for word in words if word in COLOURS] == [thing.colour for thing in scene.things]
            assert [word for word in words if word in SHAPES] == [thing.shape for thing in scene.things]
            assert [word for word in words if word in BACKGROUNDS and word != "grey"] == [scene.background] * (scene.background != "grey")
            assert scene.background in words
            named = [word for word in words if word in SIZES]
            assert named in ([], [thing.size for thing in scene.things])
            assert ("counter-clockwise" in words) <= (scene.things[0].turn < 0)
            assert ("clockwise" in words) <= (scene.things[0].turn > 0)
            assert ("wall" in words) == (scene.wall is not None)
        assert len(set(captions(scene))) == len(captions(scene)) >= 7


def test_named_motion_is_what_the_thing_does():
    """Over the first 6 frames always, over two thirds of a clip where nothing else can be met."""
    for index in range(400):
        scene = sample_scene(6, index)
        path = simulate(scene)
        for place, thing in enumerate(scene.things):
            steps = np.diff(path[:, place], axis=0)
            if thing.motion in STRAIGHT:
                named = 22 if len(scene.things) == 1 else 6
                along = steps[:named] @ np.array(STRAIGHT[thing.motion])
                assert np.all(along > 0.99)
                assert np.all(along < 3.01)
                assert np.allclose(np.linalg.norm(steps[:named], axis=1), along)
            elif thing.motion == "stays still":
                assert np.all(steps == 0)
            elif thing.motion == "bounces":
                assert np.any(np.diff(np.sign(steps[:, 1])) < 0)  # down, then up
                assert np.ptp(path[:, place, 1]) > 25
            else:
                x, y, orbit = thing.orbit
                assert 20 <= orbit <= 35
                assert np.allclose(np.hypot(path[:, place, 0] - x, path[:, place, 1] - y), orbit)


def test_canonical_prompt_is_read_back():
    for index in FEW:
        scene = sample_scene(7, index)
        back = scene_from_prompt(captions(scene)[0], seed=index)
        assert canonical(back) == canonical(scene)
        assert back == scene_from_prompt(canonical(scene), seed=index)
        assert canonical(scene_from_prompt(captions(scene)[1], seed=index), sizes=False) == captions(scene)[1]
        assert (back.wall is None) == (scene.wall is None)
    assert scene_from_prompt("a red ball moves right on a black background, with a grey wall in front", 0).wall is not None
    scene = scene_from_prompt("a red ball moves right and a blue box stays still on a black background", 0)
    assert [thing.pair for thing in scene.things] == [("red", "ball"), ("blue", "box")]
    assert scene_from_prompt("a orange ball circles on a navy background", 0).things[0].colour == "orange"


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a pink ball circles on a black background", "pink"),
        ("a red cube circles on a black background", "cube"),
        ("a huge red ball circles on a black background", "huge"),
        ("a red ball flies on a black background", "flies"),
        ("a red ball circles on a beige background", "beige"),
        ("a red ball circles", "background"),
        ("dogs on a black background", "dogs"),
        ("a red ball circles and a red ball circles and a red ball circles on a black background", "3 things"),
    ],
)
def test_prompt_that_does_not_parse_names_the_word(prompt, named):
    with pytest.raises(ValueError, match=named):
        scene_from_prompt(prompt, 0)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.sampled_from(MOTIONS)] * 2), st.tuples(*[st.sampled_from(list(SIZES))] * 2), st.integers(0, 1000))
def test_any_two_things_find_room(motions, sizes, seed):
    prompt = " and ".join(f"a {size} {colour} ball {motion}" for colour, size, motion in zip(("red", "blue"), sizes, motions, strict=True))
    path = simulate(scene_from_prompt(f"{prompt} on a black background", seed), 99)
    reach = np.array([SIZES[size] for size in sizes])
    assert np.all(path >= reach[:, None] - 1e-6)
    assert np.all(path <= 128 - reach[:, None] + 1e-6)
    assert np.hypot(*(path[:, 0] - path[:, 1]).T).min() >= reach.sum() - 1e-6


# physics


def test_nothing_leaves_the_frame_or_enters_another_thing():
    for index in range(200):
        scene = sample_scene(8, index)
        path, reach = simulate(scene, 200), np.array([thing.radius for thing in scene.things])
        assert np.all(path >= reach[:, None] - 1e-6)
        assert np.all(path <= 128 - reach[:, None] + 1e-6)
        if len(reach) == 2:
            assert np.hypot(*(path[:, 0] - path[:, 1]).T).min() >= reach.sum() - 1e-6


def test_edge_reverses_exactly():
    path = simulate(one(x=100.0, vx=2.5), 12)[:, 0, 0]
    assert np.allclose(path, [100, 102.5, 105, 107.5, 110, 112.5, 115, 116.5, 114, 111.5, 109, 106.5])  # edge at 117


def test_fall_is_a_parabola_and_keeps_its_energy():
    scene = one("bounces", y=67.0, vx=0.0)  # 50 pixels above the floor's 117: lands after sqrt(200) frames
    path = simulate(scene, 200)[:, 0, 1]
    assert np.allclose(path[:15], 67 + 0.25 * np.arange(15) ** 2)
    period = 2 * np.sqrt(200)
    phase = np.abs((np.arange(200) + period / 2) % period - period / 2)
    assert np.allclose(path, 67 + 0.25 * phase**2, atol=1e-6)


def test_circle_closes_clockwise_on_screen():
    turn = 2 * np.pi / 32
    scene = one("circles", x=64.0, y=40.0, vx=24 * turn, vy=0.0, turn=turn)
    path = simulate(scene, 33)[:, 0]
    assert np.allclose(path[32], path[0])
    assert np.allclose(path[8], [88, 64])
    assert np.allclose(path[16], [64, 88])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_collision_keeps_energy_and_momentum(seed):
    scene = scene_from_prompt("a small red ball moves right and a large blue ball moves up on a black background", seed)
    path = simulate(scene, 60)
    speed, mass = np.diff(path, axis=0), np.array([thing.radius for thing in scene.things]) ** 2
    curved = np.abs(np.diff(speed, axis=0)).sum((1, 2)) > 1e-9
    straight = ~(curved[:-1] | curved[1:])
    energy = (mass * (speed**2).sum(-1)).sum(-1)[1:-1][straight]
    assert np.allclose(energy, energy[0])
    distance = np.hypot(*(path[:, 0] - path[:, 1]).T)
    hit = int(distance.argmin())
    reach = np.array([thing.radius for thing in scene.things])
    near = path[max(hit - 2, 0) : hit + 3]
    clear_of_edges = np.all(near > reach[:, None] + 3) and np.all(near < 128 - reach[:, None] - 3)
    if distance[hit] < reach.sum() + 3 and clear_of_edges and 3 <= hit < 57:
        assert np.allclose(mass @ speed[hit - 2], mass @ speed[hit + 1])


def test_equal_things_swap_velocities_and_a_still_thing_stays():
    left = Thing("ball", "red", "small", "moves right", 40, 64, 2, 0)
    right = Thing("ball", "blue", "small", "moves left", 80, 64, -1, 0)
    speed = np.diff(simulate(Scene((left, right), "black"), 12), axis=0)
    assert np.allclose(speed[-1], [[-1, 0], [2, 0]])
    wall = Thing("box", "blue", "large", "stays still", 80, 64)
    path = simulate(Scene((left, wall), "black"), 12)
    assert np.allclose(path[:, 1], [80, 64])
    assert np.allclose(np.diff(path[:, 0], axis=0)[-1], [-2, 0])
    assert path[5, 0, 0] == pytest.approx(50)
    assert path[:, 0, 0].max() <= 50 + 1e-9


def test_pairs_do_meet_often_enough_to_learn_from():
    prompt = "a small red ball moves right and a small blue ball moves left on a black background"
    scenes = [scene_from_prompt(prompt, seed) for seed in range(60)]
    met = [np.abs(np.diff(simulate(scene, 23)[:, 0], n=2, axis=0)).max() > 0.1 for scene in scenes]
    assert 0.3 < np.mean(met) < 0.8


def test_later_start_continues_the_same_clip():
    scene = sample_scene(9, 4)
    assert np.array_equal(simulate(scene, 40)[20:], simulate(scene, 20, start=20))
    assert torch.equal(render([scene], 40, 64)[:, 20:], render([scene], 20, 64, start=20))


# pictures


def test_picture_of_a_ball_box_triangle_and_star():
    for shape in SHAPES:
        scene = Scene((Thing(shape, "white", "large", "stays still", 64, 64),), "black")
        picture = render([scene], 1)[0, 0].to(torch.float64)
        share = (picture[..., 0] - 10) / 230
        assert share.min() == 0
        assert share.max() == 1
        area = {"ball": np.pi, "box": 4 * 0.886**2, "triangle": 0.75 * 3**0.5 * 1.15**2, "star": 5 * 1.1 * 0.53 * np.sin(np.pi / 5)}[shape]
        assert float(share.sum()) == pytest.approx(area * 19**2, rel=0.02)
        assert torch.equal(share, share.flip(1))  # left as right
        rows, columns = torch.nonzero(share.amax(1)).flatten(), torch.nonzero(share.amax(0)).flatten()
        assert rows.min() >= 64 - 21
        assert rows.max() <= 64 + 21
        assert columns.min() >= 64 - 21
        assert columns.max() <= 64 + 21
        assert ((share > 0) & (share < 1)).sum() < 0.35 * share.sum()  # only the edge is mixed


def test_background_gradient_is_exact():
    picture = render([one(gradient=12.0, x=11.0, y=11.0, vx=1.0)], 1)[0, 0]
    height = (torch.arange(128) + 0.5) / 64 - 1
    expected = (torch.tensor(BACKGROUNDS["black"]) + 12 * height[:, None]).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(picture[:, 64:], expected[:, None].expand(-1, 64, -1))


def test_thing_is_drawn_where_the_simulation_says():
    for size in (64, 128, 200):
        scenes = [sample_scene(10, index, things=1) for index in range(12)]
        scenes = [replace(scene, wall=None, gradient=0.0).with_thing(0, shape="ball") for scene in scenes]
        frames = render(scenes, 9, size).to(torch.float64)
        for clip, scene in zip(frames, scenes, strict=True):
            ground = torch.tensor(BACKGROUNDS[scene.background])
            weight = (clip - ground).abs().sum(-1)
            place = torch.arange(size) + 0.5
            centre = torch.stack([(weight.sum(1) * place).sum(1), (weight.sum(2) * place).sum(1)], 1) / weight.sum((1, 2))[:, None]
            assert np.allclose(centre.numpy(), simulate(scene, 9, size)[:, 0], atol=0.1)


def test_sizes_show_the_same_clip():
    scenes = [sample_scene(11, index) for index in range(16)]
    small, large = render(scenes, 17, 64).to(torch.float32), render(scenes, 17, 128).to(torch.float32)
    halved = large.unflatten(2, (64, 2)).unflatten(4, (64, 2)).mean((3, 5))
    difference = (small - halved).abs()
    assert difference.mean() < 0.25
    assert difference.max() < 100
    assert np.allclose(simulate(scenes[0], size=64) * 2, simulate(scenes[0]))


def test_batch_is_the_clips_one_by_one():
    scenes = [sample_scene(12, index) for index in range(20)]
    batch = render(scenes, 9, 64)
    assert all(torch.equal(clip, render([scene], 9, 64)[0]) for clip, scene in zip(batch, scenes, strict=True))


def test_first_thing_is_behind_the_second_and_the_wall_before_both():
    things = tuple(Thing("box", colour, "large", "stays still", 64, 64) for colour in ("red", "blue"))
    picture = render([Scene(things, "black", wall=Wall(50, 20))], 1)[0, 0]
    assert picture[64, 70].tolist() == list(COLOURS["blue"])
    assert picture[64, 50].tolist() == [160, 160, 160]
    assert picture[3, 50].tolist() == [160, 160, 160]
    assert picture[3, 70].tolist() == [10, 10, 10]


def test_wall_hides_a_small_ball_completely():
    scene = one(x=30.0, vx=3.0, wall=Wall(66, 30))
    red = (render([scene], 25)[0, ..., 0].to(int) - render([scene], 25)[0, ..., 1].to(int) > 90).sum((1, 2))
    assert red[12] == 0
    assert red[0] > 300
    assert red[-1] > 300


# edits and twins


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edit_keeps_the_paths_and_says_what_changes(split):
    kinds = set()
    for index in range(200):
        before, after, instruction = edit_pair(1, index, split=split)
        assert np.array_equal(simulate(before), simulate(after))
        assert (before.wall, before.gradient) == (after.wall, after.gradient)
        assert after.held_out == (split == "held_out")
        assert not (split == "train" and before.held_out)
        old = {word for thing in before.things for word in (thing.colour, thing.shape, thing.size)} | {before.background}
        changes = [
            (kind, getattr(b, kind))
            for a, b in zip(before.things, after.things, strict=True)
            for kind in ("shape", "colour", "size", "motion")
            if getattr(a, kind) != getattr(b, kind)
        ]
        if before.background != after.background:
            changes.append(("background", after.background))
        (kind, value), *more = changes
        assert not more
        assert instruction.endswith(value)
        words = instruction.split()
        assert words[0] == ("turn" if kind == "shape" else "make")
        assert ({*words} & {*SHAPES, *COLOURS}) <= old | {value}
        kinds.add(kind)
    assert kinds == {"shape", "colour", "size", "background"}


def test_instruction_names_one_thing_only():
    for index in range(300):
        before, after, instruction = edit_pair(2, index)
        if len(before.things) == 2 and "background" not in instruction:
            place = 0 if before.things[0] != after.things[0] else 1
            noun = instruction.split("the ")[1]
            fits = [noun.startswith((thing.shape, f"{thing.colour} {thing.shape}")) for thing in before.things]
            assert fits[place]
            assert sum(fits) == 1


def test_twin_differs_from_its_moment_on_and_not_before():
    kinds = set()
    for index in FEW:
        scene = replace(sample_scene(13, index, things=1 + index % 2), wall=None)
        twin = impossible_twin(scene, seed=index)
        assert twin == impossible_twin(scene, seed=index)
        moment = twin.twist.frame
        kinds.add(twin.twist.kind)
        assert 11 <= moment <= 21
        true, false = render([scene, twin], CLIP, 64).to(torch.int16)
        assert torch.equal(true[:moment], false[:moment])
        assert (true - false)[moment:].abs().max() > 40
        if twin.twist.kind != "pass":
            assert (true - false)[moment].abs().max() > 40
        path, reach = simulate(twin, 60), np.array([thing.radius for thing in twin.things])
        assert np.all(path >= reach[:, None] - 1e-6)
        assert np.all(path <= 128 - reach[:, None] + 1e-6)
    assert kinds == {"vanish", "jump", "colour", "pass"}
    with pytest.raises(ValueError, match="twist already"):
        impossible_twin(twin, 0)


def test_passing_through_overlaps():
    left = Thing("ball", "red", "small", "moves right", 30, 64, 2, 0)
    right = Thing("ball", "blue", "small", "moves left", 90, 64, -2, 0)
    path = simulate(Scene((left, right), "black", twist=Twist("pass", 5)))
    assert np.allclose(path[15], [[60, 64], [60, 64]])


# dataset


def test_dataset_batches_and_captions():
    data = Toybox(seed=1, frames=5, size=64)
    single = [data[index] for index in range(30)]
    batched = data.__getitems__(list(range(30)))
    for index, (a, b) in enumerate(zip(single, batched, strict=True)):
        assert torch.equal(a["frames"], b["frames"])
        assert a["caption"] == b["caption"]
        assert a["scene"] == b["scene"]
        assert a["frames"].shape == (5, 64, 64, 3)
        assert a["frames"].dtype == torch.uint8
        assert a["scene"] == sample_scene(1, index)
        assert a["caption"] in captions(a["scene"])
    first = [sample["caption"] in captions(sample["scene"])[:2] for sample in single]
    assert 0.25 < np.mean(first) < 0.8
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate)))
    assert batch["frames"].shape == (4, 5, 64, 64, 3)
    assert batch["scene"] == [sample["scene"] for sample in single[:4]]
    assert Toybox(split="held_out", frames=1, size=16)[3]["scene"].held_out


def test_drawing_stays_on_its_device():
    """The meta device refuses to mix with the CPU, as an accelerator would."""
    scenes = [replace(sample_scene(14, index), wall=Wall(60, 20)) for index in range(8)]
    assert render(scenes, 5, 64, device="meta").shape == (8, 5, 64, 64, 3)


@pytest.mark.gpu
def test_accelerator_draws_the_same_to_one_level(device):
    scenes = [sample_scene(14, index) for index in range(32)]
    for size in (64, 128):
        there = render(scenes, 9, size, device=device).cpu()
        difference = (render(scenes, 9, size).to(int) - there.to(int)).abs()
        assert difference.max() <= 1

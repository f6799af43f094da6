"""Files in and out: what is written comes back, what is broken is said in one line, nothing half-written stays."""

import errno
import io
import os
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import reelflow
from reelflow.clip import Clip, ClipWriter, Limits, MediaError, check_output

PLACES = ["out.mp4", "out.webm", "out.gif", "out"]
MADE = {
    "model": "mini",
    "prompt": 'a "red" ball\n\\ bewegt sich – 赤いボール 🎈',
    "seed": 2**53,
    "ai_generated": True,
    "settings": {"w": 1.5, "x": None},
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def toy(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A red square on a soft gradient, moving right; the corner at the top left is white."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([40 + x * 60 // width, 60 + y * 60 // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    picture[: height // 4, : width // 4] = 240
    clip = np.stack([picture] * frames)
    side = max(1, height // 4)
    for k in range(frames):
        left = (k * 2) % max(1, width - side)
        clip[k, height // 2 : height // 2 + side, left : left + side] = (220, 40, 40)
    return clip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def encode(path: Path, frames: np.ndarray, *, rate: int = 16, times: list[int] | None = None, comment: str = "", **context) -> Path:
    """A video as strangers make them, with their own times (in units of 1/rate), comment and colour tags."""
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(context.pop("codec", "libx264"), rate=rate, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], context.pop("pixels", "yuv420p")
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = Fraction(1, rate)
        container.start_encoding()
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(
                format=stream.pix_fmt, dst_colorspace=context.get("colorspace"), dst_color_range=context.get("color_range")
            )
            frame.pts, frame.time_base = (times or range(len(frames)))[k], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# --------------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("fps", [16, 179 / 6, 30000 / 1001, 12.5])
@pytest.mark.parametrize(("name", "bound"), [("out.mp4", 33), ("out.webm", 33), ("out.gif", 34), ("out", 130), ("OUT.MP4", 33)])
def test_what_is_saved_comes_back(tmp_path, name, bound, fps):
    clip = Clip(toy(), fps, MADE)
    clip.save(tmp_path / name)
    back = Clip.open(tmp_path / name)
    assert back.frames.shape == clip.frames.shape
    assert back.fps == fps
    assert back.metadata == MADE
    assert psnr(back.frames, clip.frames) > bound
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "bound"), [("out.mp4", 44), ("out.webm", 43), ("out.gif", 39)])
def test_smooth_pictures_keep_their_quality(tmp_path, name, bound):
    """A soft blob that moves over a gradient. Chroma stored half a pixel beside its place would cost 6 dB."""
    y, x = np.mgrid[:96, :128]
    frames = []
    for k in range(12):
        blob = np.exp(-((x - 40 - 3 * k) ** 2 + (y - 48) ** 2) / 150)[:, :, None]
        ground = np.stack([40 + x * 0.5, 60 + y * 0.5, 90 + 0 * x], axis=-1)
        frames.append(np.round(ground * (1 - blob) + np.array([220, 40, 40]) * blob).astype(np.uint8))
    clip = Clip(np.stack(frames), 16)
    clip.save(tmp_path / name)
    assert psnr(Clip.open(tmp_path / name).frames, clip.frames) > bound


def test_a_still_comes_back_exactly(tmp_path):
    clip = Clip(toy(1), 24, MADE)
    clip.save(tmp_path / "out.png")
    back = Clip.open(tmp_path / "out.png")
    assert np.array_equal(back.frames, clip.frames)
    assert (back.fps, back.metadata) == (24, MADE)


@pytest.mark.parametrize("name", [*PLACES, "out.png"])
@pytest.mark.parametrize("size", [(1, 1), (47, 64), (48, 63), (33, 35)])
def test_odd_sizes_come_back(tmp_path, name, size):
    clip = Clip(toy(1 if name == "out.png" else 3, *size), 16, {"prompt": "odd"})
    for metadata in (True, False):
        clip.save(tmp_path / name, metadata=metadata)
        back = Clip.open(tmp_path / name)
        assert back.frames.shape == clip.frames.shape
        assert psnr(back.frames, clip.frames) > 24
        assert back.metadata == ({"prompt": "odd"} if metadata else {})


@pytest.mark.parametrize("name", [*PLACES, "out.png"])
def test_metadata_can_be_long_and_can_be_left_out(tmp_path, name):
    clip = Clip(toy(1 if name == "out.png" else 9), 16, {"prompt": "ü'\"{}\n" * 1700})
    clip.save(tmp_path / name)
    assert Clip.open(tmp_path / name).metadata == clip.metadata
    clip.save(tmp_path / name, metadata=False)
    back = Clip.open(tmp_path / name)
    assert back.metadata == {}
    assert len(back) == len(clip)
    assert back.fps == 16
    files = [tmp_path / name] if (tmp_path / name).is_file() else (tmp_path / name).iterdir()
    assert not any(word in file.read_bytes() for file in files for word in (b"prompt", b"made"))


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(TEXT, TEXT | st.integers() | st.booleans()))
def test_any_metadata_comes_back(tmp_path_factory, metadata):
    folder = tmp_path_factory.mktemp("any")
    for name in PLACES:
        Clip(toy(2, 16, 16), 16, metadata).save(folder / name)
        assert Clip.open(folder / name).metadata == metadata


@pytest.mark.parametrize("metadata", [{"loss": float("nan")}, {"path": Path("x")}])
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
    with pytest.raises(MediaError, match="metadata must be JSON"):
        Clip(toy(2), 16, metadata).save(tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "comment", ["made with love", '{"prompt": "x"}', "[" * 100_000, '{"reelflow": 1, "fps": "x", "size": [1], "made": 3}']
)
def test_comments_of_strangers_are_passed_over(tmp_path, comment):
    back = Clip.open(encode(tmp_path / "in.mp4", toy(), comment=comment))
    assert back.metadata == {}
    assert (len(back), back.fps, back.height) == (9, 16, 48)


def test_a_comment_is_not_believed_against_the_file(tmp_path):
    """Another program retimed and enlarged our file and kept the comment."""
    comment = '{"reelflow": 1, "fps": 8, "size": [7, 9], "made": {"prompt": "x"}}'
    back = Clip.open(encode(tmp_path / "in.mp4", toy(), rate=24, comment=comment))
    assert (back.fps, back.frames.shape, back.metadata) == (24, (9, 48, 64, 3), {"prompt": "x"})


def test_a_still_scene_keeps_its_frames(tmp_path):
    for name in PLACES:
        Clip(np.stack([toy(1)[0]] * 33), 16).save(tmp_path / name, metadata=False)
        back = Clip.open(tmp_path / name)
        assert (len(back), back.fps) == (33, 16)


def test_colours_are_not_shifted(tmp_path):
    colours = [(220, 40, 40), (50, 180, 70), (50, 80, 220), (240, 240, 240), (10, 10, 10), (90, 90, 90)]
    for colour in colours:
        frames = np.full((3, 32, 32, 3), colour, np.uint8)
        for name, bound in (("out.mp4", 2), ("out.webm", 3), ("out.gif", 0)):
            Clip(frames, 16).save(tmp_path / name)
            assert np.abs(Clip.open(tmp_path / name).frames.astype(int) - frames).max() <= bound, (name, colour)


# -------------------------------------------------------------------------------------------------------------- kinds of file


def test_mp4_plays_everywhere(tmp_path):
    Clip(toy(33), 16, MADE).save(tmp_path / "out.mp4")
    data = (tmp_path / "out.mp4").read_bytes()
    boxes, place = [], 0
    while place < len(data):
        boxes.append(data[place + 4 : place + 8])
        place += int.from_bytes(data[place : place + 4])
    assert boxes.index(b"moov") < boxes.index(b"mdat")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert (stream.frames, stream.average_rate) == (33, 16)


def test_webm_is_vp9(tmp_path):
    Clip(toy(5), 16).save(tmp_path / "out.webm")
    with av.open(str(tmp_path / "out.webm")) as container:
        assert container.streams.video[0].codec_context.name == "vp9"


def test_gif_loops_at_the_right_speed(tmp_path):
    Clip(toy(32), 16).save(tmp_path / "out.gif")
    with Image.open(tmp_path / "out.gif") as picture:
        picture.load()
        assert picture.info["loop"] == 0
        assert picture.n_frames == 32
        durations = []
        for k in range(32):
            picture.seek(k)
            durations.append(picture.info["duration"])
    assert sum(durations) == 2000
    with pytest.raises(MediaError, match="GIF shows at most 50"):
        Clip(toy(2), 60).save(tmp_path / "fast.gif")


def test_a_folder_is_numbered_and_says_how_it_was_made(tmp_path):
    Clip(toy(3), 16, {"prompt": "x"}).save(f"{tmp_path}/v1.0/")
    assert sorted(file.name for file in (tmp_path / "v1.0").iterdir()) == ["000000.png", "000001.png", "000002.png", "metadata.json"]
    assert "prompt" in (tmp_path / "v1.0" / "metadata.json").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.avi", r"\.mp4, \.webm, \.gif"), ("no/out.mp4", "does not exist"), ("here.mp4", "is a folder"), ("file", "is a file")],
)
def test_what_cannot_be_written_is_said_at_once(tmp_path, name, message):
    (tmp_path / "here.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(MediaError, match=message):
        check_output(tmp_path / name)
    with pytest.raises(MediaError, match=message):
        Clip(toy(2), 16).save(tmp_path / name)


def test_png_takes_one_frame(tmp_path):
    with pytest.raises(MediaError, match="the clip has 2"):
        Clip(toy(2), 16).save(tmp_path / "out.png")
    with pytest.raises(MediaError, match="holds one frame"), ClipWriter(tmp_path / "out.png", 16, 48, 64) as out:
        out.write(toy(1))
        out.write(toy(1))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("name", PLACES)
def test_frames_can_be_written_as_they_come(tmp_path, name):
    frames = toy(9)
    with ClipWriter(tmp_path / name, 16, 48, 64, {"seed": 1}) as out:
        out.write(frames[:1])
        assert not (tmp_path / name).exists()
        out.write(frames[1:5])
        out.write(frames[5:])
    Clip(frames, 16).save(tmp_path / f"whole.{name}" if name != "out" else tmp_path / "whole")
    whole = Clip.open(tmp_path / f"whole.{name}" if name != "out" else tmp_path / "whole")
    assert np.array_equal(Clip.open(tmp_path / name).frames, whole.frames)


@pytest.mark.parametrize(("name", "size"), [("out.mp4", (32, 32)), ("out.mp4", (240, 320)), ("out.webm", (32, 32)), ("out.gif", (32, 32))])
def test_the_same_clip_is_the_same_file(tmp_path, name, size):
    clip = Clip(toy(20, *size), 16, MADE)
    files = set()
    for k in range(6):
        litter = [bytes(1000 * n) for n in range(7 * k)]  # another state of the memory each time
        clip.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        files.add(Clip.open(tmp_path / name).frames.tobytes() if name == "out.webm" else data)  # Matroska numbers files at random
        del litter
    assert len(files) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", [*PLACES, "out.png"])
def test_an_interrupted_clip_leaves_nothing(tmp_path, name, error):
    with pytest.raises(error), ClipWriter(tmp_path / name, 16, 48, 64) as out:
        out.write(toy(1))
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*PLACES, "out.png"])
def test_an_interrupt_while_finishing_keeps_the_older_file(tmp_path, name, monkeypatch):
    frames = toy(1)
    Clip(frames, 16, {"take": 1}).save(tmp_path / name)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Clip(frames, 16, {"take": 2}).save(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert Clip.open(tmp_path / name).metadata == {"take": 1}


def test_a_clip_without_frames_is_not_written(tmp_path):
    with pytest.raises(MediaError, match="no frames came"), ClipWriter(tmp_path / "out.mp4", 16, 48, 64):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*PLACES, "out.png"])
def test_a_full_disk_is_one_line(tmp_path, name, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full: make room") as caught:
        Clip(toy(1), 16).save(tmp_path / name)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


FILL = """
import resource, sys
import numpy as np
import reelflow
from reelflow.clip import Clip
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
noise = np.random.default_rng(0).integers(0, 255, (int(sys.argv[2]), 64, 64, 3), dtype=np.uint8)
try:
    Clip(noise, 16, {"prompt": "x"}).save(sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize(("name", "frames"), [("out.mp4", 1), *((name, 60) for name in PLACES)])
def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path, name, frames):
    """The operating system refuses the write itself: while frames are encoded, or while the file is finished."""
    command = [sys.executable, "-c", FILL, str(tmp_path / name), str(frames)]
    environment = {**os.environ, "PYTHONPATH": str(Path(reelflow.__file__).parents[1])}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "the disk is full" in run.stdout
    assert len(run.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PLACES)
def test_overwriting_is_a_choice(tmp_path, name):
    Clip(toy(5), 16, {"take": 1}).save(tmp_path / name)
    with pytest.raises(MediaError, match="exists"):
        Clip(toy(2), 16).save(tmp_path / name, overwrite=False)
    assert Clip.open(tmp_path / name).metadata == {"take": 1}
    Clip(toy(2), 16, {"take": 2}).save(tmp_path / name)
    back = Clip.open(tmp_path / name)
    assert (len(back), back.metadata) == (2, {"take": 2})
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "IMG_0001.png").write_bytes(b"precious")
    with pytest.raises(MediaError, match=r"IMG_0001\.png"):
        Clip(toy(2), 16).save(tmp_path / "holiday")
    assert (tmp_path / "holiday" / "IMG_0001.png").read_bytes() == b"precious"


def test_the_writer_refuses_other_frames(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(F, 48, 64, 3\)"), ClipWriter(tmp_path / "out.mp4", 16, 48, 64) as out:
        out.write(toy(2, 48, 48))
    with pytest.raises(ValueError, match="float64"), ClipWriter(tmp_path / "out.mp4", 16, 48, 64) as out:
        out.write(toy(2) / 255.0)
    with pytest.raises(ValueError, match="not open"):
        ClipWriter(tmp_path / "out.mp4", 16, 48, 64).write(toy(1))
    assert not list(tmp_path.iterdir())


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    Clip(toy(2), 16).save(tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------------------------ videos from afar


@pytest.mark.parametrize(("matrix", "turned"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_a_rotated_video_comes_upright(tmp_path, matrix, turned):
    """The matrix is the track header's own: (0, 1, -1, 0) shows the picture turned clockwise, as phones store portraits."""
    plain = Clip.open(encode(tmp_path / "plain.mp4", toy()))
    data = (tmp_path / "plain.mp4").read_bytes()

    def box(a: int, b: int, c: int, d: int) -> bytes:
        return b"".join((value << 16).to_bytes(4, signed=True) for value in (a, b, 0, c, d))

    header = data.index(b"tkhd")
    assert data[header:].count(box(1, 0, 0, 1)) == 1
    (tmp_path / "turned.mp4").write_bytes(data[:header] + data[header:].replace(box(1, 0, 0, 1), box(*matrix)))
    assert np.array_equal(Clip.open(tmp_path / "turned.mp4").frames, np.rot90(plain.frames, turned, axes=(1, 2)))


@pytest.mark.parametrize("name", ["in.mp4", "in.mkv"])
def test_frames_of_a_varying_rate_stand_at_their_times(tmp_path, name):
    """Four frames shown from 0, 1, 4 and 6 eighths of a second: 4 frames in 6/8 + 1 steps make 4 per second on average."""
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 80, 160, 240)])
    back = Clip.open(encode(tmp_path / name, frames, rate=8, times=[0, 1, 4, 6]))
    assert back.fps == pytest.approx(4, abs=0.01)
    shown = back.frames.mean(axis=(1, 2, 3))
    assert shown[:4] == pytest.approx([0, 80, 160, 240], abs=3) or shown[:4] == pytest.approx([80, 80, 160, 240], abs=3)


def test_a_pause_is_kept_as_a_pause(tmp_path):
    """Thirty frames at 30 per second, then a second of nothing new, then thirty more: the pause shows the frame before it."""
    frames = np.concatenate([np.full((30, 32, 32, 3), 60, np.uint8), np.full((30, 32, 32, 3), 200, np.uint8)])
    back = Clip.open(encode(tmp_path / "in.mp4", frames, rate=30, times=[*range(30), *range(60, 90)]))
    assert back.seconds == pytest.approx(3, abs=0.1)
    bright = back.frames.mean(axis=(1, 2, 3)) > 130
    assert np.argmax(bright) / back.fps == pytest.approx(2, abs=0.06)
    assert np.all(bright[np.argmax(bright) :])


def test_recordings_that_were_joined_go_on(tmp_path):
    """Times that start again are no reason to lose frames."""
    one = encode(tmp_path / "one.ts", np.stack([np.full((32, 32, 3), 10 * k, np.uint8) for k in range(10)]))
    two = encode(tmp_path / "two.ts", np.stack([np.full((32, 32, 3), 100 + 10 * k, np.uint8) for k in range(10)]))
    (tmp_path / "both.ts").write_bytes(one.read_bytes() + two.read_bytes())
    back = Clip.open(tmp_path / "both.ts")
    assert back.frames.mean(axis=(1, 2, 3)) == pytest.approx(np.arange(0, 200, 10), abs=3)
    assert back.fps == 16


@pytest.mark.parametrize(("colorspace", "color_range"), [(1, 1), (1, 2), (5, 1), (5, 2)])
def test_colour_tags_are_obeyed(tmp_path, colorspace, color_range):
    frames = np.full((3, 32, 32, 3), (220, 40, 40), np.uint8)
    path = encode(tmp_path / "in.mp4", frames, colorspace=colorspace, color_range=color_range)
    assert np.abs(Clip.open(path).frames.astype(int) - frames).max() <= 3


@pytest.mark.parametrize(("height", "matrix"), [(720, 1), (480, 5)])
def test_colour_without_tags_is_taken_as_players_take_it(tmp_path, height, matrix):
    frame = av.VideoFrame.from_ndarray(np.full((height, 64, 3), (220, 40, 40), np.uint8), "rgb24")
    stored = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=1)
    planes = stored.to_ndarray()
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode())
    assert np.abs(Clip.open(tmp_path / "in.mp4").frames.astype(int) - [220, 40, 40]).max() <= 3


def test_a_comment_in_no_known_encoding_is_passed_over(tmp_path):
    data = encode(tmp_path / "in.mp4", toy(2), comment="caf\u00e9").read_bytes()
    (tmp_path / "in.mp4").write_bytes(data.replace("caf\u00e9".encode(), b"caf\xe9\xff"))
    assert Clip.open(tmp_path / "in.mp4").metadata == {}


@pytest.mark.parametrize(
    ("name", "codec"),
    [*((f"in.{kind}", "mpeg4") for kind in ("mkv", "mp4", "mov", "avi")), ("in.mkv", "libvpx-vp9"), ("in.mp4", "libvpx-vp9")],
)
def test_other_containers_and_codecs(tmp_path, name, codec):
    back = Clip.open(encode(tmp_path / name, toy(), codec=codec))
    assert (len(back), back.fps) == (9, 16)


def test_wide_pixels_are_made_square(tmp_path):
    """PAL: 720 pixels stored for a width of 768."""
    back = Clip.open(encode(tmp_path / "in.mp4", toy(2, 48, 60), sample_aspect_ratio=Fraction(16, 15)))
    assert back.frames.shape == (2, 48, 64, 3)


def test_a_trimmed_video_is_whole(tmp_path):
    """An edit list that shows half of the stored frames, as phones trim, is no damage."""
    data = bytearray(encode(tmp_path / "in.mp4", toy(30)).read_bytes())
    duration = data.index(b"elst") + 12
    data[duration : duration + 4] = (int.from_bytes(data[duration : duration + 4]) // 2).to_bytes(4)
    (tmp_path / "in.mp4").write_bytes(data)
    back = Clip.open(tmp_path / "in.mp4")
    assert (len(back), back.fps) == (15, 16)


def test_start_and_max_frames(tmp_path):
    frames = np.stack([np.full((32, 32, 3), 6 * k, np.uint8) for k in range(40)])
    for path in (encode(tmp_path / "in.mp4", frames, gop_size=12), encode(tmp_path / "in.mkv", frames, gop_size=12)):
        part = Clip.open(path, max_frames=5, start=17 / 16)
        assert part.frames.mean(axis=(1, 2, 3)) == pytest.approx([102, 108, 114, 120, 126], abs=2)
        assert part.fps == 16
        assert len(Clip.open(path, start=39 / 16)) == 1
        with pytest.raises(MediaError, match="start=9 s"):
            Clip.open(path, start=9)
    Clip(frames, 16).save(tmp_path / "folder")
    assert np.array_equal(Clip.open(tmp_path / "folder", max_frames=5, start=17 / 16).frames, frames[17:22])
    Clip(frames, 16).save(tmp_path / "in.gif")
    assert np.array_equal(Clip.open(tmp_path / "in.gif", max_frames=5, start=17 / 16).frames, frames[17:22])
    for wrong in ({"max_frames": 0}, {"start": -1.0}, {"start": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Clip.open(tmp_path / "in.mp4", **wrong)


# ---------------------------------------------------------------------------------------------------------- pictures from afar


def opened(tmp_path: Path, picture: Image.Image, name: str = "in.png", **options) -> np.ndarray:
    picture.save(tmp_path / name, **options)
    clip = Clip.open(tmp_path / name)
    assert len(clip) == 1
    return clip.frames[0]


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("in.png", "in.tif", "in.pgm"):
        frame = opened(tmp_path, Image.fromarray(ramp), name)
        assert np.abs(frame.astype(float) - ramp[:, :, None] / 257).max() <= 0.5, name


def test_kinds_of_pictures(tmp_path):
    rgb = Image.fromarray(toy(1)[0])
    grey = np.asarray(rgb.convert("L"))
    assert np.array_equal(opened(tmp_path, rgb.convert("L")), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(opened(tmp_path, rgb.quantize(16)), np.asarray(rgb.quantize(16).convert("RGB")))
    assert psnr(opened(tmp_path, rgb.convert("CMYK"), "in.jpg", quality=95), np.asarray(rgb)) > 30
    assert psnr(opened(tmp_path, rgb, "in.webp", quality=95), np.asarray(rgb)) > 30
    assert set(np.unique(opened(tmp_path, rgb.convert("1")))) == {0, 255}
    with pytest.raises(MediaError, match="convert it to 8 or 16 bits"):
        opened(tmp_path, Image.fromarray(np.zeros((4, 4), np.float32)), "in.tif")


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (200, 0, 0, 255)
    rgba[0, 0] = (0, 0, 0, 128)
    frame = opened(tmp_path, Image.fromarray(rgba))
    assert frame[0, 3].tolist() == [255, 255, 255]
    assert frame[3, 0].tolist() == [200, 0, 0]
    assert frame[0, 0] == pytest.approx([127] * 3, abs=1)
    paletted = Image.fromarray(rgba[..., :3]).quantize(4)
    frame = opened(tmp_path, paletted, transparency=paletted.getpixel((3, 3)))
    assert frame[3, 3].tolist() == [255, 255, 255]
    assert frame[3, 0].tolist() == [200, 0, 0]
    assert opened(tmp_path, Image.fromarray(rgba).convert("LA"))[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(tmp_path, orientation):
    """Against the definition in the EXIF standard: where the first row and the first column are shown."""
    stored = toy(1)[0]
    across = stored.swapaxes(0, 1)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: across,
        6: across[:, ::-1],
        7: across[::-1, ::-1],
        8: across[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(tmp_path, Image.fromarray(stored), exif=exif), upright)


def test_a_colour_profile_is_applied(tmp_path):
    """A profile in which red and blue change places must show; sRGB's own, and one that is damaged, must not."""
    rgb = Image.fromarray(toy(1)[0])
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(opened(tmp_path, rgb, icc_profile=srgb), np.asarray(rgb))
    assert np.array_equal(opened(tmp_path, rgb, icc_profile=b"nonsense"), np.asarray(rgb))
    named = srgb.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    swapped = named.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
    assert psnr(opened(tmp_path, rgb, icc_profile=swapped), np.asarray(rgb)[:, :, ::-1]) > 40


def test_animations_have_their_rate_and_background(tmp_path):
    pictures = [Image.fromarray(frame) for frame in toy(4)]
    for name in ("in.gif", "in.webp", "in.png"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=40, loop=0)
        back = Clip.open(tmp_path / name)
        assert (len(back), back.fps) == (4, 25), name
        assert psnr(back.frames, toy(4)) > 25, name
    pictures[0].save(tmp_path / "slow.gif", save_all=True, append_images=pictures[1:], duration=[100, 100, 300, 100])
    back = Clip.open(tmp_path / "slow.gif")
    assert back.seconds == pytest.approx(0.6, abs=0.1)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for k in (10, 2, 1):
        Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / f"frame{k}.png")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    back = Clip.open(tmp_path)
    assert back.frames[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert back.fps == 16
    Image.new("RGB", (8, 9)).save(tmp_path / "frame3.png")
    with pytest.raises(MediaError, match="changes its size to 8 x 9"):
        Clip.open(tmp_path)


# ---------------------------------------------------------------------------------------------------------- files that are broken


def refused(path: Path, *words: str, **options) -> str:
    """The one line in which `path` is refused."""
    with pytest.raises(MediaError) as caught:
        Clip.open(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    for word in words:
        assert word in line, line
    return line


def test_what_is_no_video(tmp_path):
    refused(tmp_path / "missing.mp4", "does not exist")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty (0 bytes)")
    (tmp_path / "text.mp4").write_text("hello world, this is a text" * 99)
    refused(tmp_path / "text.mp4", "neither a picture nor a video")
    (tmp_path / "text.png").write_text("hello world, this is a text" * 99)
    refused(tmp_path / "text.png", "neither a picture nor a video")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "holds no pictures")
    refused(tmp_path / "empty.mp4" / "x.mp4", "cannot be read")
    (tmp_path / "photo.heic").write_bytes(bytes(3) + b"\x18ftypheic" + bytes(1000))
    refused(tmp_path / "photo.heic", "HEIC", ".jpg")


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(tmp_path / "in.mp4", "no video", "audio")


def test_a_video_without_frames(tmp_path):
    refused(encode(tmp_path / "in.mp4", np.zeros((0, 48, 64, 3), np.uint8)), "no frames")
    refused(encode(tmp_path / "in.mkv", np.zeros((0, 48, 64, 3), np.uint8)), "no frames")


def test_no_permission(tmp_path, monkeypatch):
    encode(tmp_path / "in.mp4", toy(2))

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Image, "open", forbidden)
    refused(tmp_path / "in.mp4", "no permission")
    monkeypatch.setattr(Path, "iterdir", forbidden)
    refused(tmp_path, "no permission")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MediaError, match="may not write"):
        check_output(tmp_path / "out.mp4")


def test_a_video_cut_off_before_its_index(tmp_path):
    data = encode(tmp_path / "whole.mp4", toy(30)).read_bytes()
    assert data.index(b"moov") > len(data) // 2
    (tmp_path / "in.mp4").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "in.mp4", "without its index (moov)", "cut off")


@pytest.mark.parametrize("name", ["in.mp4", "in.webm", "in.gif", "in.mkv"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.97])
def test_a_video_cut_off_in_the_middle(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    if name == "in.mkv":
        encode(tmp_path / name, noise)
    else:
        Clip(noise, 16).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    line = refused(tmp_path / name, "damaged or cut off")
    count = int(line.partition("max_frames=")[2].partition(";")[0])
    assert 0 < count < 30
    assert len(Clip.open(tmp_path / name, max_frames=count)) == count


@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.webp", "in.tif", "in.bmp"])
def test_a_picture_cut_off(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        refused(tmp_path / name)


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("specimens")
    for name in ("a.mp4", "a.webm", "a.gif"):
        Clip(toy(4, 32, 32), 16, {"prompt": "ü"}).save(folder / name)
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        Image.fromarray(toy(1)[0]).save(folder / name)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.mp4", "a.webm", "a.gif", "a.png", "a.jpg", "a.webp", "a.tif"]),
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused(specimens, tmp_path, name, seed, count):
    """Random bytes overwritten: a clip or one line, never another exception."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(specimens[name], np.uint8).copy()
    data[rng.integers(0, len(data), count)] = rng.integers(0, 256, count)
    (tmp_path / name).write_bytes(data.tobytes())
    try:
        assert len(Clip.open(tmp_path / name, limits=Limits(memory=2**28)))
    except MediaError as error:
        assert name in str(error)


# ------------------------------------------------------------------------------------------------------------------------ limits


def test_limits_hold(tmp_path):
    Clip(toy(33), 16).save(tmp_path / "in.mp4")
    Clip(toy(33), 16).save(tmp_path / "in.gif")
    Clip(toy(33), 16).save(tmp_path / "in")
    for name in ("in.mp4", "in.gif", "in"):
        path = tmp_path / name
        refused(path if name != "in" else path / "000000.png", "64 x 48 pixels", limits=Limits(pixels=3000))
        refused(path, "over the limit of 20 frames", limits=Limits(frames=20))
        refused(path, "GiB", limits=Limits(memory=100_000))
        assert len(Clip.open(path, max_frames=8, limits=Limits(frames=20, memory=100_000))) == 8
    refused(tmp_path / "in.mp4", "(1 s)", limits=Limits(seconds=1))


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    """A few hundred bytes that say 60,000 x 60,000 pixels."""
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    raw = bytearray(data.getvalue())
    raw[16:24] = (60_000).to_bytes(4) * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4)
    (tmp_path / "bomb.png").write_bytes(raw)
    refused(tmp_path / "bomb.png", "too large")
    raw[16:24] = (9_000).to_bytes(4) * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4)
    (tmp_path / "large.png").write_bytes(raw)
    refused(tmp_path / "large.png", "9000 x 9000 pixels")


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {secret}\n"],
)
def test_files_that_open_other_files_are_refused(tmp_path, text):
    secret = encode(tmp_path / "secret.mp4", toy(2))
    (tmp_path / "in.mp4").write_text(text.format(secret=secret))
    refused(tmp_path / "in.mp4", "neither a picture nor a video")
    refused(Path("http://localhost:9/in.mp4"), "does not exist")

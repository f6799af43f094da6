"""Reading videos, pictures and folders of pictures.

Files come from strangers: only local files in known formats are opened, sizes are checked before anything is decoded, and
whatever a decoder objects to becomes one `MediaError` line. Frames are placed by their presentation times on a constant rate.

Shapes: F frames of H x W pixels, 3 = red, green, blue; uint8 sRGB.
"""

import io
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile

from reelflow.media.comment import MediaError, unpack
from reelflow.media.picture import on_white, picture_rgb
from reelflow.media.timeline import Limits, Shown, Sieve, constant_rate, gather, on_grid, reason

PICTURE_FPS = 16.0  # of a still, and of a folder of pictures that does not say
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv"  # no playlists: those open further files
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
# swscale's defaults darken every colour by one or two levels and repeat chroma; these round, and interpolate it.
EXACT = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP)

Media = tuple[np.ndarray, float, dict[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What a file shows: upright frames of `height` x `width` pixels for `seconds`; 0 of a still."""

    height: int
    width: int
    seconds: float


def probe(path: str | Path) -> Facts:
    """What a video or picture shows, from its header and its first frame. Raises `MediaError` as `read` does."""
    path = Path(path)
    height, width = read(path, max_frames=1)[0].shape[1:3]
    with _reading(path):
        try:
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                shown = _animation(path, picture) if _moves(picture) else ()
                return Facts(height, width, max((frame.time + frame.duration for frame in shown), default=0.0))
        except UnidentifiedImageError:
            pass
        with _opened(path) as container:
            stream = container.streams.video[0]
            finish, tick = _said_end(container, stream), stream.time_base or Fraction(1, 1000)
            if finish is not None:
                return Facts(height, width, finish - float((stream.start_time or 0) * tick))
            packets = [(packet.pts, packet.pts + (packet.duration or 0)) for packet in container.demux(stream) if packet.pts is not None]
            return Facts(height, width, float((max(end for _, end in packets) - min(begin for begin, _ in packets)) * tick))


def read(
    path: str | Path, max_frames: int | None = None, start: float = 0.0, limits: Limits | None = None, sieve: Sieve | None = None
) -> Media:
    """Frames (F, H, W, 3), frames per second and metadata of a video, a picture or a folder of pictures.

    sieve: bring a video or picture to another rate and size while it is decoded. `Clip.open` describes the other arguments.
    Raises `MediaError` for everything that is wrong with the file.
    """
    path, limits = Path(path), limits or Limits()
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}: use 1 or more, or None for all")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start is {start}: use seconds from the beginning, 0 or more")
    with _reading(path):
        if path.is_dir():
            return _read_folder(path, max_frames, start, limits)
        if path.stat().st_size == 0:
            raise MediaError(f"{path} is empty (0 bytes): make or download it again")
        try:
            picture = Image.open(path, formats=PICTURE_FORMATS)
        except UnidentifiedImageError:
            return _read_video(path, max_frames, start, limits, sieve)
        with picture:
            return _read_picture(path, picture, max_frames, start, limits, sieve)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Every way in which opening a file fails, as one line."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist: check the name and the folder") from None
    except PermissionError:
        raise MediaError(f"{path} cannot be read: this user has no permission; change it or copy the file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{path} is too large to decode ({error}): make it smaller") from None
    except (OSError, ValueError, RuntimeError, av.FFmpegError, zlib.error) as error:
        raise MediaError(f"{path} cannot be read ({reason(error)}): make or download it again") from error


# ------------------------------------------------------------------------------------------------------------------- videos


def _read_video(path: Path, max_frames: int | None, start: float, limits: Limits, sieve: Sieve | None) -> Media:
    with _opened(path) as container:
        stream = next((stream for stream in container.streams.video if stream.codec_context is not None), None)
        if stream is None:
            kinds = ", ".join(stream.type for stream in container.streams)
            what = f"no video that can be decoded (it holds {kinds})" if kinds else "no frames in it"
            raise MediaError(f"{path} has {what}: make or download it again, or convert it to .mp4 with H.264")
        facts = unpack({key.lower(): value for key, value in container.metadata.items()}.get("comment"))
        rate, tick, finish = (stream.average_rate or Fraction(25), stream.time_base or Fraction(1, 1000), _said_end(container, stream))
        expected = max((finish or 0.0) - start, 0.0)
        expected = expected if max_frames is None else min(expected, max_frames / (sieve.fps if sieve else float(rate)))
        limits.check(path, stream.height, stream.width)
        size = (sieve.height, sieve.width, sieve.fps) if sieve else (stream.height, stream.width, float(rate))
        limits.check(path, *size[:2], expected * size[2], expected)
        if start and (finish is None or start < finish):
            container.seek(int(start / tick), stream=stream)
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        shown = _decoded(container, stream, rate, finish)
        pictures, times, end = gather(path, sieve(path, shown, start) if sieve else shown, max_frames, start, limits)
    if sieve:
        return np.stack(pictures), sieve.fps, facts.get("made", {})
    rate = constant_rate(times, end, float(tick), [facts.get("fps"), stream.average_rate])
    frames = on_grid(path, pictures, times, end, rate, max_frames, limits)
    height, width = facts.get("size", frames.shape[1:3])
    if (height + height % 2, width + width % 2) == frames.shape[1:3]:  # MP4 has even sides: the writer padded them
        frames = frames[:, :height, :width]
    return frames, float(rate), facts.get("made", {})


def _opened(path: Path) -> InputContainer:
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        raise MediaError(f"{path} is a HEIC photo, which cannot be read: convert it to .jpg or .png")
    options = {"protocol_whitelist": "file", "format_whitelist": VIDEO_FORMATS}
    try:
        return av.open(f"file:{path.absolute()}", mode="r", container_options=options, metadata_errors="replace")
    except av.error.EOFError:
        raise MediaError(f"{path} has no frames in it: make or download it again") from None
    except (av.error.InvalidDataError, av.error.ArgumentError, IndexError):
        cut = head[4:8] == b"ftyp"
        why = "is a video without its index (moov): it was cut off" if cut else "is neither a picture nor a video that can be read"
        raise MediaError(f"{path} {why}; make or download it again, or convert it to .mp4") from None


def _said_end(container: InputContainer, stream: av.VideoStream) -> float | None:
    """When the video ends, in seconds, by its header; None where the header is silent or the end an estimate."""
    if not container.format.name.startswith(("mov", "matroska", "avi")):
        return None
    if stream.duration and stream.time_base:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    clock = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska, per track
    if clock:
        return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


def _decoded(container: InputContainer, stream: av.VideoStream, rate: Fraction, finish: float | None) -> Iterator[Shown]:
    """Every frame; raises where a packet is damaged, and where the file stops before `finish` seconds."""
    time, end, jump = -math.inf, 0.0, 0.0
    shortest, longest = math.inf, 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt and finish is not None:  # broadcasts, which have no end, begin and join within frames
            raise EOFError("the file stops within a frame")
        for frame in packet.decode():
            tick = float(frame.time_base or 0)
            duration = (frame.duration or 0) * tick or float(1 / rate)
            before, time = time, end if frame.pts is None else frame.pts * tick + jump
            if time < before:  # recordings joined without new times
                jump, time = jump + end - time, end
            end, shortest, longest = time + duration, min(shortest, duration), max(longest, duration)
            yield Shown(time, duration, partial(_video_rgb, frame, stream.sample_aspect_ratio))
    varying = max(longest - shortest, 0.0)  # at a varying rate the last frame's own duration is not reliable
    if finish is not None and end + varying + 0.5 / float(rate) < finish:
        raise EOFError(f"it stops at {end:.2f} of {finish:.2f} s")


def _video_rgb(frame: av.VideoFrame, aspect: Fraction | None) -> np.ndarray:
    """Upright, with square pixels, (H, W, 3). Untagged colour is BT.709 from 720 lines on, else BT.601, as players assume.

    aspect: width of a stored pixel over its height, if the file says.
    """
    alpha = any(component.is_alpha for component in frame.format.components)
    untagged_hd = frame.colorspace == 2 and frame.height >= 720
    stretched = aspect is not None and aspect != 1 and Fraction(1, 4) <= aspect <= 4
    picture = frame.to_ndarray(
        format="rgba" if alpha else "rgb24",
        width=round(frame.width * aspect) if aspect and stretched else None,
        src_colorspace=Colorspace.ITU709 if untagged_hd else None,
        interpolation=EXACT,
    )
    rgb = on_white(Image.fromarray(picture)) if alpha else picture
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))


# ----------------------------------------------------------------------------------------------------------------- pictures


def _read_picture(
    path: Path, picture: Image.Image, max_frames: int | None, start: float, limits: Limits, sieve: Sieve | None
) -> Media:
    limits.check(path, picture.height, picture.width)
    shown = _animation(path, picture)
    if sieve:  # Pillow has one picture at a time: it is converted before the next one comes
        converted = (Shown(frame.time, frame.duration, partial(np.asarray, frame.picture())) for frame in shown)
        shown = sieve(path, converted, start)
        max_frames = max_frames if _moves(picture) else 1
    pictures, times, end = gather(path, shown, max_frames, start, limits)
    facts = unpack(picture.info.get("comment"))
    if sieve:
        return np.stack(pictures), sieve.fps, facts.get("made", {})
    if not _moves(picture):
        return np.stack(pictures), facts.get("fps", PICTURE_FPS), facts.get("made", {})
    rate = constant_rate(times, end, 0.01, [facts.get("fps")])
    return on_grid(path, pictures, times, end, rate, max_frames, limits), float(rate), facts.get("made", {})


def _moves(picture: Image.Image) -> bool:
    return picture.format == "GIF" or (picture.format in ANIMATED_FORMATS and getattr(picture, "n_frames", 1) > 1)


def _animation(path: Path, picture: Image.Image) -> Iterator[Shown]:
    """Every frame; raises where a GIF stops before its end mark, which Pillow passes over."""
    time, moves = 0.0, _moves(picture)
    for index in itertools.count():
        try:
            picture.seek(index)
        except EOFError:
            break
        picture.load()
        duration = (picture.info.get("duration") or 100) / 1000  # browsers take 0 ms for 100
        yield Shown(time, duration, partial(picture_rgb, picture, str(path)))
        time += duration
        if not moves:
            return
    if isinstance(picture, GifImageFile) and picture.fp is not None:
        picture.fp.seek(-32, io.SEEK_END)
        if not picture.fp.read().rstrip(b"\0").endswith(b";"):
            raise EOFError("it has no end mark")


def _read_folder(path: Path, max_frames: int | None, start: float, limits: Limits) -> Media:
    """A folder of pictures in the order of their numbers, at the rate that its metadata.json says, else `PICTURE_FPS`."""
    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")]
    files.sort(key=lambda file: [part.zfill(20) for part in re.split(r"(\d+)", file.name)])
    if not files:
        raise MediaError(f"{path} holds no pictures ({', '.join(PICTURE_SUFFIXES)}): choose another folder, or a video")
    note = path / "metadata.json"
    facts = unpack(note.read_bytes()) if note.is_file() else {}
    fps = facts.get("fps", PICTURE_FPS)

    shown = (Shown(k / fps, 1 / fps, partial(_one_picture, file, limits)) for k, file in enumerate(files))
    pictures, _, _ = gather(path, shown, max_frames, start, limits)
    return np.stack(pictures), fps, facts.get("made", {})


def _one_picture(path: Path, limits: Limits) -> np.ndarray:
    return read(path, max_frames=1, limits=limits)[0][0]

"""Writing videos, GIFs and pictures, frame by frame.

Files are for keeping: everything goes to a temporary name in the same folder, is synced to the disk and then renamed, so that
a name never holds half a clip, whatever interrupts the writing.

Shapes: F frames of H x W pixels, 3 = red, green, blue; uint8 sRGB.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reelflow.media.comment import MediaError, pack
from reelflow.media.read import EXACT
from reelflow.media.timeline import rational

MAX_GIF_FPS = 50  # browsers slow down what is faster
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class VideoForm:
    """How one kind of video is written: the first of `encoders` (name, options) that this PyAV has."""

    container: str
    encoders: dict[str, dict[str, str]]
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    even: bool = False  # sides must be
    cosited: bool = False  # see _to_yuv


VIDEO_FORMS = {
    ".mp4": VideoForm(
        container="mp4",
        # mbtree reads memory that nobody set at some widths: without it the same clip is the same file every time
        encoders={"libx264": {"crf": "17", "preset": "medium", "mbtree": "0"}, "libopenh264": {"b": "8M"}},
        options={"movflags": "+faststart"},
        even=True,
        cosited=True,
    ),
    ".webm": VideoForm(container="webm", encoders={"libvpx-vp9": {"crf": "20", "b": "0", "cpu-used": "3", "row-mt": "1"}}),
    ".gif": VideoForm(container="gif", encoders={"gif": {}}, pixels="pal8", options={"loop": "0"}),
}
WRITABLE = f"{', '.join(VIDEO_FORMS)}, .png (one frame), or a folder (no extension, or a trailing slash) for numbered PNGs"


def check_output(path: str | Path, overwrite: bool = True) -> str:
    """Find out before the work whether a clip can be written to `path`.

    Returns the kind: ".mp4", ".webm", ".gif", ".png" or "folder". Raises `MediaError` for an extension that cannot be
    written, a folder that does not exist, a target that exists (unless `overwrite`) or that is of another kind.
    """
    text, path = os.fspath(path), Path(path)
    kind = "folder" if text.endswith(("/", os.sep)) or not path.suffix else path.suffix.lower()
    if kind not in VIDEO_FORMS and kind not in (".png", "folder"):
        raise MediaError(f"{path} cannot be written, {kind} is not known: use {WRITABLE}")
    if not path.parent.is_dir():
        raise MediaError(f"{path} cannot be written, the folder {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK):
        raise MediaError(f"{path} cannot be written, this user may not write to {path.parent}: choose another folder")
    if not path.exists():
        return kind
    if not overwrite:
        raise MediaError(f"{path} exists: choose another name, or allow overwriting")
    if path.is_dir() != (kind == "folder"):
        raise MediaError(f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another name")
    if kind == "folder":
        foreign = next((file.name for file in path.iterdir() if not re.fullmatch(r"\d{6,}\.png|metadata\.json", file.name)), None)
        if foreign:
            raise MediaError(f"{path} holds other files, such as {foreign}: choose another folder")
    return kind


class Sink(Protocol):
    """Where frames go: one class per kind of file, writing to the path it was made with."""

    def write(self, picture: np.ndarray) -> None:
        """Append one frame (H, W, 3)."""

    def close(self, finish: bool) -> None:
        """Let go of the file; `finish` it first, or leave it as it is."""


class VideoSink:
    """A video through PyAV."""

    def __init__(self, path: Path, form: VideoForm, fps: float, height: int, width: int, comment: str | None) -> None:
        name = next((name for name in form.encoders if name in av.codecs_available), None)
        if name is None:
            raise MediaError(f"this PyAV has no encoder among {', '.join(form.encoders)}: install av from PyPI, or save as .gif")
        self.path, self.form, self.comment, self.count = path, form, comment, 0
        self.step = 1 / rational(fps)
        self.padding = ((0, height % 2), (0, width % 2), (0, 0)) if form.even else None
        self.container = av.open(str(path), mode="w", format=form.container, container_options=form.options)
        if comment is not None and form.container != "gif":
            self.container.metadata["comment"] = comment
        stream = self.container.add_stream(name, rate=1 / self.step, options=form.encoders[name])
        assert isinstance(stream, av.VideoStream)
        self.stream = stream
        stream.height, stream.width, stream.pix_fmt = height, width, form.pixels
        if self.padding:
            stream.height, stream.width = height + height % 2, width + width % 2
        stream.codec_context.time_base = self.step
        self.graph = None
        if form.pixels == "yuv420p":
            self.graph = _to_yuv(stream.height, stream.width, form.cosited)
            stream.codec_context.colorspace, stream.codec_context.color_range = (Colorspace.ITU709, ColorRange.MPEG)
            stream.codec_context.color_primaries, stream.codec_context.color_trc = (ColorPrimaries.BT709, ColorTrc.BT709)

    def write(self, picture: np.ndarray) -> None:
        if self.padding:
            picture = np.pad(picture, self.padding, mode="edge")
        if self.graph is None:
            frame = _paletted(picture)
        else:
            self.graph.vpush(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            frame = self.graph.vpull()
        frame.pts, frame.time_base = self.count, self.step
        self.count += 1
        self.container.mux(self.stream.encode(frame))

    def close(self, finish: bool) -> None:
        try:
            if finish:
                self.container.mux(self.stream.encode())
        finally:
            self.container.close()
        if finish and self.form.container == "gif" and self.comment is not None:
            _insert_gif_comment(self.path, self.comment.encode())


class PictureSink:
    """One PNG, or a folder of numbered ones with a metadata.json."""

    def __init__(self, path: Path, folder: bool, comment: str | None) -> None:
        self.path, self.folder, self.comment, self.count = path, folder, comment, 0
        if folder:
            path.mkdir()
            (path / "metadata.json").write_text(comment or "{}", encoding="utf-8")

    def write(self, picture: np.ndarray) -> None:
        if self.count and not self.folder:
            raise MediaError("a .png holds one frame, the clip has more: use .mp4, .webm, .gif, or a folder")
        info = PngInfo()
        if self.comment is not None and not self.folder:
            info.add_itxt("comment", self.comment)
        target = self.path / f"{self.count:06d}.png" if self.folder else self.path
        Image.fromarray(picture).save(target, format="PNG", pnginfo=info)
        self.count += 1

    def close(self, finish: bool) -> None:
        """Every picture is whole already."""


def _to_yuv(height: int, width: int, cosited: bool) -> av.filter.Graph:
    """From RGB to yuv420p in BT.709, rounding exactly. cosited: chroma on the left pixel of two, as H.264 players take it."""
    place = ":out_h_chr_pos=0:out_v_chr_pos=128" if cosited else ""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 1000))
    scale = graph.add("scale", f"flags={EXACT}:out_color_matrix=bt709:out_range=tv{place}")
    graph.link_nodes(source, scale, graph.add("format", "yuv420p"), graph.add("buffersink")).configure()
    return graph


def _paletted(picture: np.ndarray) -> av.VideoFrame:
    """With the 256 colours that suit this frame best, without dithering: dither flickers, and does not compress."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=picture.shape[1], height=picture.shape[0], format=av.VideoFormat("rgb24"), time_base=Fraction(1, 1000))
    split, colours = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    mapped, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(mapped, 0, 0)
    split.link_to(colours, 1, 0)
    colours.link_to(mapped, 0, 1)
    mapped.link_to(sink)
    graph.configure()
    graph.vpush(av.VideoFrame.from_ndarray(picture, format="rgb24"))
    graph.vpush(None)
    return graph.vpull()


def _insert_gif_comment(path: Path, comment: bytes) -> None:
    """Put a comment block behind the header, which PyAV does not write: pieces of at most 255 bytes, each after its length."""
    data = path.read_bytes()
    header = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 128 else 0)
    pieces = [comment[i : i + 255] for i in range(0, len(comment), 255)]
    block = b"\x21\xfe" + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"
    path.write_bytes(data[:header] + block + data[header:])


class ClipWriter:
    """Writes a clip as its frames come: `with ClipWriter("out.mp4", 16, 128, 128) as out: out.write(frames)`.

    The file appears under its name when the block ends without an exception; otherwise nothing is left behind.

    path: by extension .mp4 (H.264, yuv420p, BT.709, faststart), .webm (VP9), .gif, .png (one frame), or a folder (no extension
        or a trailing slash) of 000000.png, 000001.png … with a metadata.json.
    fps: frames per second, above 0 to 1000 (GIF: 50). height, width: pixels, 1 or more.
    metadata: how the clip was made, anything JSON; None leaves it out.
    overwrite: replace what exists under this name; a folder only if it holds nothing but numbered PNGs.

    Raises `MediaError` at once for what cannot be written, `OSError` with one clear line when the disk is full.
    """

    def __init__(
        self, path: str | Path, fps: float, height: int, width: int, metadata: Mapping[str, Any] | None = None, overwrite: bool = True
    ) -> None:
        self.kind = check_output(path, overwrite)
        if not 0.001 <= fps <= (MAX_GIF_FPS if self.kind == ".gif" else 1000):
            limit = f"GIF shows at most {MAX_GIF_FPS}" if self.kind == ".gif" else "use 0.001 to 1000"
            raise MediaError(f"{path} at {fps} frames per second cannot be written: {limit}; resample the clip")
        if height < 1 or width < 1:
            raise MediaError(f"{path} with frames of {width} x {height} pixels cannot be written: use 1 x 1 or more")
        self.path, self.fps, self.height, self.width = (Path(os.path.realpath(path)), fps, height, width)
        self.comment = self._comment(metadata)
        self.temporary = self.path.with_name(f".{self.path.name[:50]}.{secrets.token_hex(4)}.part")
        self.count = 0
        self._sink: Sink | None = None

    def _comment(self, metadata: Mapping[str, Any] | None) -> str | None:
        """Without metadata only what the file needs to be read back: the rate of a folder, the true size of an odd MP4."""
        facts: dict[str, Any] = {"fps": self.fps} if metadata is not None or self.kind == "folder" else {}
        if self.kind == ".mp4" and (self.height % 2 or self.width % 2):
            facts["size"] = [self.height, self.width]
        return pack(metadata, **facts) if facts else None

    def __enter__(self) -> Self:
        with self._all_or_nothing():
            if self.kind in VIDEO_FORMS:
                form = VIDEO_FORMS[self.kind]
                self._sink = VideoSink(self.temporary, form, self.fps, self.height, self.width, self.comment)
            else:
                self._sink = PictureSink(self.temporary, self.kind == "folder", self.comment)
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 (F, H, W, 3). Raises ValueError for another kind or size."""
        if self._sink is None:
            raise ValueError("ClipWriter is not open: use it as `with ClipWriter(…) as out`")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            wanted = f"uint8 (F, {self.height}, {self.width}, 3)"
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, this writer takes {wanted}")
        with self._all_or_nothing():
            for picture in frames:
                self._sink.write(np.ascontiguousarray(picture))
                self.count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._all_or_nothing():
            if kind is not None:
                self._discard()
                return
            if not self.count or self._sink is None:
                raise MediaError(f"{self.path} was not written: no frames came")
            self._sink.close(finish=True)
            self._sink = None
            for file in self.temporary.iterdir() if self.kind == "folder" else [self.temporary]:
                _sync(file)
            if self.kind == "folder" and self.path.exists():
                replaced = self.temporary.with_suffix(".old")
                os.rename(self.path, replaced)
                os.rename(self.temporary, self.path)
                shutil.rmtree(replaced)
            else:
                os.replace(self.temporary, self.path)
            _sync(self.path.parent)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Remove the temporary on any exception, interrupts included; say in one line when the disk is full."""
        try:
            yield
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                where = f"{self.path} was not written, the disk is full: make room in {self.path.parent} or choose another folder"
                raise OSError(error.errno, where) from error
            if isinstance(error, av.FFmpegError):
                raise MediaError(f"{self.path} could not be written: {error}; try another size or kind of file") from error
            raise

    def _discard(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            with suppress(Exception):  # it failed already; this only lets go of the file
                sink.close(finish=False)
        shutil.rmtree(self.temporary) if self.temporary.is_dir() else self.temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk and not only on their way."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

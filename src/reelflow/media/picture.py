"""One Pillow picture of any kind as plain upright sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

from reelflow.media.comment import MediaError


def picture_rgb(picture: Image.Image, name: str = "the picture") -> np.ndarray:
    """A Pillow picture of any mode as (H, W, 3) uint8 sRGB.

    Turned upright by its EXIF tag, transparency over white, 16 bits scaled to 8, its colour profile applied.
    Raises `MediaError`, which calls it `name`, for samples without a known range (32 bits, floating point).
    """
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode[0] in "IF":  # 16 bits, grey; 32 bits and floating point have no known range
        samples = np.asarray(upright)
        if upright.mode == "F" or samples.min() < 0 or samples.max() > 65535:
            raise MediaError(f"{name} has samples of kind {upright.mode!r} without a known range: convert it to 8 or 16 bits")
        grey = np.round(samples / 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.has_transparency_data:
        return on_white(_in_srgb(upright.convert("RGBA"), picture.info.get("icc_profile")))
    converted = upright if upright.mode == "CMYK" else upright.convert("RGB")
    return np.asarray(_in_srgb(converted, picture.info.get("icc_profile")).convert("RGB"))


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply a colour profile; one that is damaged or of another kind is passed over, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        mode = "RGB" if picture.mode == "CMYK" else picture.mode
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode) or picture
    except (OSError, ImageCms.PyCMSError):
        return picture


def fitted(frame: np.ndarray, height: int, width: int, place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A frame (H, W, 3) at another size: the largest part of the same shape, scaled with an antialiased filter, never squashed.

    place: where that part lies, across and down, from 0 (left, top) to 1; the middle by default.
    """
    scale = max(height / frame.shape[0], width / frame.shape[1])
    across, down = min(width / scale, frame.shape[1]), min(height / scale, frame.shape[0])
    left, top = (frame.shape[1] - across) * place[0], (frame.shape[0] - down) * place[1]
    box = (left, top, min(left + across, frame.shape[1]), min(top + down, frame.shape[0]))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS, box=box))


def on_white(picture: Image.Image) -> np.ndarray:
    """An RGBA picture over white, (H, W, 3)."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))

"""Encoded images: what they cost in prompt tokens, and their pixels as the engine wants them.

In: encoded bytes. Out: the image's size (header only, no pixel is decoded), its prompt tokens by
Llama 4's tiling rule, and, in the replica, an RGB image. Faults become ``RowError``.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from pipeline.errors import ErrorCode, RowError
from pipeline.image_headers import count_passes

Image.MAX_IMAGE_PIXELS = None  # limits.max_image_pixels is checked instead, with a clear error

FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
"""What may be opened, for people. Pillow's other readers are never tried."""
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
"""By Pillow's names; its JPEG reader opens MPO, as phones write, too."""
_MOST_PASSES = 32
"""Of ``limits.max_image_pixels``, some 3 s; a progressive JPEG has about ten scans."""
_EXIF_ORIENTATION = 0x0112
_EXIF_SWAPS_SIDES = frozenset({5, 6, 7, 8})


@dataclass(frozen=True, slots=True)
class ImageTiling:
    """How a model cuts images into tiles, and what a tile costs (Llama 4).

    A tile has ``tile_tokens`` tokens. An image of T tiles takes ``tile_tokens + 3`` prompt tokens
    (start, image, end) if T = 1, else ``(tile_tokens + 1) * T + tile_tokens + 3``: each tile has a
    separator, and a thumbnail follows.
    """

    tile_size: int
    """Side of a square tile, pixels."""
    tile_tokens: int
    max_tiles: int
    """``max_patches`` of the image processor, the thumbnail not counted."""
    to_max_canvas: bool = False

    def tokens(self, width: int, height: int) -> int:
        """Prompt tokens of an image of ``width`` x ``height`` pixels."""
        return self._tokens_of(self.tiles(width, height))

    @property
    def most_tokens(self) -> int:
        """Prompt tokens of the most expensive image."""
        return self._tokens_of(self.max_tiles)

    def _tokens_of(self, tiles: int) -> int:
        if tiles == 1:
            return self.tile_tokens + 3
        return (self.tile_tokens + 1) * tiles + self.tile_tokens + 3

    def tiles(self, width: int, height: int) -> int:
        """Tiles of the best canvas: least upscaling, else least downscaling, then least area.

        Same float32 arithmetic as the image processor of transformers, so ties fall the same way.
        """
        grids = _grids(self.max_tiles)
        canvas = (grids * self.tile_size).astype(np.float32)
        scales = np.minimum(canvas[:, 0] / np.float32(height), canvas[:, 1] / np.float32(width))
        enlarging = scales[scales >= 1]
        if enlarging.size:
            chosen = enlarging.max() if self.to_max_canvas else enlarging.min()
        else:
            chosen = scales.max()
        return int(grids[scales == chosen].prod(axis=1).min())


@lru_cache(maxsize=8)
def _grids(max_tiles: int) -> NDArray[np.int64]:
    """All (rows, columns) with rows x columns <= max_tiles; int array of shape (n, 2)."""
    pairs = [
        (rows, columns)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    ]
    return np.array(pairs, dtype=np.int64)


def image_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels after EXIF rotation, from the header alone.

    Raises:
        RowError: ``image_invalid`` if no image can be recognised, or decoding would cost much more
            than its pixels do; ``image_too_large``.
    """
    passes = count_passes(data)
    if canvas := _webp_canvas(data):
        _check_pixels(*canvas, max_pixels)  # Pillow allocates it on opening
    with _reading(data) as image:
        width, height = image.size
        _check_pixels(width, height, max_pixels)
        if isinstance(image, TiffImageFile):
            _check_tile(image, max_pixels)
        # of TIFF, Pillow's size is the rotated one already
        swapped = image.format != "TIFF" and _orientation(image) in _EXIF_SWAPS_SIDES
    if width * height * passes > _MOST_PASSES * max_pixels:
        reason = f"{passes} scans of {width}x{height} pixels"
        raise RowError(ErrorCode.IMAGE_INVALID, f"image has {reason}: it would take too long")
    return (height, width) if swapped else (width, height)


def decode(data: bytes) -> Image.Image:
    """The image in RGB, EXIF rotation applied, transparency on white: vLLM's own pixels.

    Raises:
        RowError: ``image_invalid`` if the bytes are truncated or corrupt.
    """
    with _reading(data) as image:
        image.load()
        upright: Image.Image = image
        with suppress(Exception):  # as vLLM: an image whose EXIF is broken stays as it lies
            upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright)


def _to_rgb(upright: Image.Image) -> Image.Image:
    if upright.mode == "RGB":
        return upright
    if upright.mode not in ("RGBA", "LA", "PA") and "transparency" not in upright.info:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    canvas = Image.new("RGB", layer.size, "white")
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas


@contextmanager
def _reading(data: bytes) -> Iterator[Image.Image]:
    """An opened image. Whatever Pillow raises on these bytes is the row's error: its decoders
    raise anything on damaged input, from SyntaxError to NotImplementedError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd but readable metadata
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                yield image
    except (RowError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        raise _invalid(data, error) from None


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, without decoding pixels, which PNG's own ``getexif`` does."""
    with suppress(Exception):  # as in decode
        value: int | None = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
        return value
    return None


def _check_tile(image: TiffImageFile, max_pixels: int) -> None:
    """A tile is decoded whole, however small the image it is cut to."""
    width, height = (image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH))
    if width * height > max_pixels:
        raise RowError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"image has tiles of {width}x{height} = {width * height} pixels; "
            f"limits.max_image_pixels is {max_pixels}",
        )


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RowError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"image is {width}x{height} = {width * height} pixels; "
            f"limits.max_image_pixels is {max_pixels}",
        )


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP header states."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            sides = data[24:27], data[27:30]
            return int.from_bytes(sides[0], "little") + 1, int.from_bytes(sides[1], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None


def _invalid(data: bytes, error: Exception) -> RowError:
    unknown = isinstance(error, UnidentifiedImageError)
    reason = f"not readable as {FORMATS}" if unknown else error
    return RowError(ErrorCode.IMAGE_INVALID, f"image of {len(data)} bytes: {reason}")

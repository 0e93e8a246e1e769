"""pipeline.images against vLLM's own loader and transformers' own processor, on the same bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ErrorCode, RowError
from pipeline.images import ImageTiling, decode, image_size

pytest.importorskip("vllm")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def noise(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    shape = size[1], size[0], len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    if shape[2] == 1:
        return Image.fromarray(values[:, :, 0], "L").convert(mode)
    return Image.fromarray(values, mode)


def rotated(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def deep_grey() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65_535, 23 * 37).astype(np.uint16).reshape(23, 37))


def cases() -> dict[str, bytes]:
    palette = noise("RGB").quantize(16)
    found = {f"PNG {mode}": encoded(noise(mode), "PNG") for mode in ("1", "L", "LA", "RGB", "RGBA")}
    found |= {f"JPEG {mode}": encoded(noise(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    found |= {f"TIFF {mode}": encoded(noise(mode), "TIFF") for mode in ("1", "RGBA", "CMYK", "LA")}
    found |= {f"WEBP {mode}": encoded(noise(mode), "WEBP") for mode in ("RGB", "RGBA")}
    found |= {f"BMP {mode}": encoded(noise(mode), "BMP") for mode in ("1", "L", "RGB", "RGBA")}
    frames = [noise("RGB").quantize(8) for _ in range(3)]
    return found | {
        "PNG P": encoded(palette, "PNG"),
        "PNG P transparent": encoded(palette, "PNG", transparency=3),
        "PNG RGB transparent": encoded(noise("RGB"), "PNG", transparency=(1, 2, 3)),
        "PNG 16 bit": encoded(deep_grey(), "PNG"),
        "TIFF 16 bit": encoded(deep_grey(), "TIFF"),
        "GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "GIF transparent": encoded(palette, "GIF", transparency=2),
        "WEBP frames": encoded(noise("RGB"), "WEBP", save_all=True, append_images=[noise("RGB")]),
        "PNG pixel": encoded(noise("RGB", (2, 1)).crop((0, 0, 1, 1)), "PNG"),
        "PNG long": encoded(noise("RGB", (2, 10_000)), "PNG"),
        **{f"JPEG turn {n}": encoded(noise("RGB"), "JPEG", exif=rotated(n)) for n in range(1, 9)},
        "PNG turn 6": encoded(noise("RGB"), "PNG", exif=rotated(6)),
        "TIFF turn 8": encoded(noise("RGB"), "TIFF", tiffinfo={0x0112: 8}),
        "JPEG broken metadata": encoded(
            noise("RGB"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
        ),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_vllms_and_the_header_tells_their_size(name: str) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    ours = decode(CASES[name])
    theirs = ImageMediaIO().load_bytes(CASES[name]).media
    assert ours.mode == theirs.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert image_size(CASES[name], max_pixels=10**6) == ours.size


@pytest.mark.parametrize("max_tiles", [1, 4, 16])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 10_000), (10_000, 1), (336, 336), (337, 336), (900, 700)]
)
def test_tiles_are_the_image_processors(max_tiles: int, width: int, height: int) -> None:
    from transformers import Llama4ImageProcessor

    processor = Llama4ImageProcessor(max_patches=max_tiles, size={"height": 336, "width": 336})
    made = processor(np.zeros((height, width, 3), np.uint8), return_tensors="pt")
    tiles = made["pixel_values"].shape[0]
    tiling = ImageTiling(tile_size=336, tile_tokens=144, max_tiles=max_tiles)
    assert tiling.tiles(width, height) == max(1, tiles - 1)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PPM", "TGA", "PDF", "JPEG2000", "DDS"])
def test_other_formats_are_refused_by_name(kind: str) -> None:
    with pytest.raises(RowError) as caught:
        image_size(encoded(noise("RGB", (32, 32)), kind), max_pixels=10**6)
    assert caught.value.code == ErrorCode.IMAGE_INVALID
    assert "PNG, JPEG, WEBP, GIF, BMP, TIFF" in caught.value.message

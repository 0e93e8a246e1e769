"""Images: token counts by Llama 4's rule, sizes from headers, pixels as the engine wants them."""

import io
import zlib

import pytest
from PIL import Image

from pipeline.errors import ErrorCode, RowError
from pipeline.images import ImageTiling, decode, image_size

MAVERICK = ImageTiling(tile_size=336, tile_tokens=144, max_tiles=16)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (336, 336, 147),
        (337, 337, 727),
        (640, 480, 727),
        (800, 600, 1017),
        (1280, 720, 1887),
        (1024, 1024, 2467),
        (1, 1, 147),
        (1, 10_000, 2467),
    ],
)
def test_maverick_image_tokens_match_the_known_counts(width: int, height: int, tokens: int) -> None:
    assert MAVERICK.tokens(width, height) == tokens


def test_the_tiling_is_the_image_processors_for_any_size() -> None:
    """The reference is transformers' own function, over a grid of awkward sizes."""
    torch = pytest.importorskip("torch")
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import (
        find_supported_resolutions,
        get_best_fit,
    )

    resolutions = torch.tensor(
        find_supported_resolutions(max_num_chunks=16, patch_size=SizeDict(height=336, width=336))
    )
    sides = [1, 55, 335, 336, 337, 500, 671, 672, 673, 1008, 1344, 2000, 5377, 9001]
    for height in sides:
        for width in sides:
            best_height, best_width = get_best_fit((height, width), resolutions)
            expected = int(best_height) // 336 * (int(best_width) // 336)
            assert MAVERICK.tiles(width, height) == expected, (width, height)


@pytest.mark.parametrize("cap", [1, 4, 16])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 10_000), (10_000, 1), (336, 336), (337, 336), (640, 480), (2000, 900)]
)
def test_the_tokens_are_those_transformers_writes_into_the_prompt(
    size: tuple[int, int], cap: int
) -> None:
    pytest.importorskip("torch")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    tiling = ImageTiling(tile_size=336, tile_tokens=144, max_tiles=cap)
    images = Llama4ImageProcessor(max_patches=cap, size={"height": 336, "width": 336})
    (grid,) = images(Image.new("RGB", size))["aspect_ratios"]
    writer = Llama4Processor.__new__(Llama4Processor)
    vars(writer).update(
        image_token="<|image|>",
        img_patch_token="<|patch|>",
        start_of_img_token="<|image_start|>",
        end_of_img_token="<|image_end|>",
        tile_token="<|tile_x_separator|>",
        tile_global_token="<|tile_y_separator|>",
    )
    prompt = writer._prompt_split_image(grid, 144)
    assert tiling.tokens(*size) == prompt.count("<|")
    assert tiling.tokens(*size) <= tiling.most_tokens


def test_fewer_allowed_tiles_cost_fewer_tokens() -> None:
    small = ImageTiling(tile_size=336, tile_tokens=144, max_tiles=4)
    assert small.tokens(1024, 1024) == 4 * 145 + 147


def test_exif_rotation_swaps_the_sides_as_decoding_does() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (300, 100)), "JPEG", exif=exif)
    assert image_size(data, max_pixels=10**6) == decode(data).size == (100, 300)


def test_an_image_above_the_pixel_cap_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (5000, 5000)))
    with pytest.raises(RowError) as caught:
        image_size(data, max_pixels=1_000_000)
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE
    assert "5000x5000" in caught.value.message


def test_a_decompression_bomb_is_refused_without_decoding_it() -> None:
    header = encoded(Image.new("1", (1, 1)))
    sides = (100_000).to_bytes(4, "big") * 2
    bomb = header[:16] + sides + header[24:29]  # IHDR of 100,000 x 100,000 pixels
    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, "big") + header[33:]
    with pytest.raises(RowError) as caught:
        image_size(bomb, max_pixels=10**8)
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE


def test_rotated_pngs_are_measured_without_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(Image.new("L", (300, 100)), "PNG", exif=exif)
    assert image_size(data, max_pixels=10**6) == decode(data).size == (100, 300)


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_bytes_that_are_no_image_are_the_rows_error(data: bytes) -> None:
    with pytest.raises(RowError) as caught:
        image_size(data, max_pixels=10**6)
    assert caught.value.code == ErrorCode.IMAGE_INVALID


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_found_when_it_is_decoded(kind: str) -> None:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    data = encoded(image, kind)
    with pytest.raises(RowError) as caught:
        decode(data[: len(data) // 2])
    assert caught.value.code == ErrorCode.IMAGE_INVALID


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_pixel_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (3, 2)), kind)).mode == "RGB"


def test_transparency_becomes_white() -> None:
    data = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)

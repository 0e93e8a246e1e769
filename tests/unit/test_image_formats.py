"""Image formats: the pixels are those vLLM makes of the same bytes; hostile headers cost little."""

import io
import re
import struct
import tracemalloc
import zlib
from itertools import islice
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import ErrorCode, RowError
from pipeline.images import FORMATS, decode, image_size

SOURCE = Image.effect_noise((37, 21), 90)
RGB = Image.merge("RGB", [SOURCE, SOURCE.rotate(180), SOURCE.transpose(Image.Transpose(0))])
RGBA = Image.merge("RGBA", [*RGB.split(), SOURCE])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def measured_and_decoded(data: bytes) -> Image.Image:
    image_size(data, max_pixels=10**6)
    return decode(data)


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def broken_exif() -> bytes:
    """An orientation, and an EXIF directory that lies beyond the end."""
    entries = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHLL", 0x8769, 4, 1, 9999)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4)


XMP_ROTATION = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'

IMAGES = {
    "png-rgb": encoded(RGB, "PNG"),
    "png-rgba": encoded(RGBA, "PNG"),
    "png-grey": encoded(SOURCE, "PNG"),
    "png-grey-alpha": encoded(RGBA.convert("LA"), "PNG"),
    "png-palette": encoded(RGB.convert("P"), "PNG"),
    "png-palette-one-clear": encoded(RGB.convert("P"), "PNG", transparency=7),
    "png-palette-alphas": encoded(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "png-rgb-one-clear": encoded(RGB, "PNG", transparency=RGB.getpixel((0, 0))),
    "png-grey-one-clear": encoded(SOURCE, "PNG", transparency=SOURCE.getpixel((0, 0))),
    "png-1-bit": encoded(SOURCE.convert("1"), "PNG"),
    "png-16-bit": encoded(SOURCE.convert("I;16").point(lambda level: level * 250), "PNG"),
    "png-rotated": encoded(RGB, "PNG", exif=rotated(8)),
    "png-1-pixel": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
    "png-line": encoded(RGB.resize((1, 10_000)), "PNG"),
    "jpeg": encoded(RGB, "JPEG"),
    "jpeg-grey": encoded(SOURCE, "JPEG"),
    "jpeg-cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg-progressive": encoded(RGB, "JPEG", progressive=True),
    "jpeg-broken-exif": encoded(RGB, "JPEG", exif=broken_exif()),
    "jpeg-xmp-rotated": encoded(RGB, "JPEG", xmp=XMP_ROTATION),
    "mpo": encoded(RGB, "MPO", save_all=True, append_images=[SOURCE.convert("RGB")]),
    "webp": encoded(RGB, "WEBP"),
    "webp-lossless-alpha": encoded(RGBA, "WEBP", lossless=True),
    "webp-rotated": encoded(RGB, "WEBP", exif=rotated(6)),
    "webp-animated": encoded(RGB, "WEBP", save_all=True, append_images=[SOURCE.convert("RGB")]),
    "gif": encoded(RGB, "GIF"),
    "gif-animated": encoded(RGB, "GIF", save_all=True, append_images=[SOURCE]),
    "gif-clear": encoded(RGBA, "GIF"),
    "bmp": encoded(RGB, "BMP"),
    "bmp-alpha": encoded(RGBA, "BMP"),
    "bmp-palette": encoded(RGB.convert("P"), "BMP"),
    "bmp-1-bit": encoded(SOURCE.convert("1"), "BMP"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff-lzw-alpha": encoded(RGBA, "TIFF", compression="tiff_lzw"),
    "tiff-cmyk": encoded(RGB.convert("CMYK"), "TIFF"),
    "tiff-16-bit": encoded(SOURCE.convert("I;16").point(lambda level: level * 250), "TIFF"),
    "tiff-float": encoded(SOURCE.convert("F"), "TIFF"),
    "tiff-lab": encoded(Image.merge("LAB", RGB.split()), "TIFF"),
    "tiff-grey-alpha": encoded(RGBA.convert("LA"), "TIFF"),
    "tiff-rotated": encoded(RGB, "TIFF", exif=rotated(5)),
    **{f"jpeg-exif-{turn}": encoded(RGB, "JPEG", exif=rotated(turn)) for turn in range(10)},
}


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in IMAGES.items()])
def test_the_pixels_are_vllms(data: bytes) -> None:
    reference = pytest.importorskip("vllm.multimodal.media.image").ImageMediaIO()
    expected = reference.load_bytes(data).media
    image = decode(data)
    assert (image.mode, image.size) == (expected.mode, expected.size)
    assert image.tobytes() == expected.tobytes()
    assert image_size(data, max_pixels=10**6) == image.size


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "JPEG2000", "EPS"])
def test_another_format_is_refused_with_those_that_may_be_used(kind: str) -> None:
    with pytest.raises(RowError) as caught:
        image_size(encoded(RGB, kind), max_pixels=10**6)
    assert caught.value.code == ErrorCode.IMAGE_INVALID
    assert FORMATS in caught.value.message


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", b"")


def tiff(*tags: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF header with one directory of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", following)


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<LllHHLLllLL", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<LHHL", 54, 0, 0, 54) + info


def webp(kind: bytes, body: bytes) -> bytes:
    inner = b"WEBP" + kind + struct.pack("<L", len(body)) + body + bytes(16)
    return b"RIFF" + struct.pack("<L", len(inner)) + inner


def sized_tiff(width: int, height: int) -> bytes:
    pairs = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 1)]
    return tiff(*((tag, 4, 1, value) for tag, value in pairs))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(2**31 - 1, 2**31 - 1), id="png"),
        pytest.param(gif(65535, 65535), id="gif"),
        pytest.param(bmp(2**31 - 1, 2**31 - 1), id="bmp"),
        pytest.param(bmp(-9, 9), id="bmp-negative"),
        pytest.param(sized_tiff(65535, 65535), id="tiff"),
        pytest.param(sized_tiff(2**31, 2**31), id="tiff-2-31"),
        pytest.param(webp(b"VP8X", bytes(4) + b"\xff" * 6), id="webp-canvas"),
        pytest.param(webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(9)), id="webp-lossless"),
        pytest.param(webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"), id="webp"),
    ],
)
def test_an_absurd_size_is_refused_from_the_header(data: bytes) -> None:
    with pytest.raises(RowError) as caught:
        image_size(data, max_pixels=10**8)
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE


@pytest.mark.parametrize("data", [png(0, 9), gif(0, 0)[:13], bmp(0, 9), sized_tiff(0, 9)])
def test_an_image_without_pixels_is_invalid(data: bytes) -> None:
    with pytest.raises(RowError) as caught:
        measured_and_decoded(data)
    assert caught.value.code == ErrorCode.IMAGE_INVALID


MANY_TAGS = tiff(*((tag, 1, 12 * 65_000, 0) for tag in range(65_000)))
BIG_TIFF = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 2**63) + bytes(100)
BOMBS = {
    "tiff-tags": MANY_TAGS,
    "tiff-big-count": BIG_TIFF,
    "tiff-count": tiff((256, 4, 2**32 - 1, 8)),
    "tiff-loop": tiff((256, 4, 1, 1), following=8),
    "png-text": png(9, 9, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))] * 9),
    "png-profile": png(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))),
    "png-exif": png(9, 9, chunk(b"eXIf", MANY_TAGS)),
    "jpeg-exif": b"\xff\xd8"
    + b"".join(
        b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part
        for part in (MANY_TAGS[at : at + 60_000] for at in range(0, len(MANY_TAGS), 60_000))
    )
    + encoded(RGB, "JPEG")[2:],
    "webp-exif": encoded(RGB, "WEBP", exif=MANY_TAGS),
}


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in BOMBS.items()])
def test_a_hostile_header_takes_little_memory(data: bytes) -> None:
    """Pillow bounds what tags and texts may hold; one that did not would take up to 50 GB here."""
    tracemalloc.start()
    try:
        outcome: object = image_size(data, max_pixels=10**8)
    except RowError as error:
        outcome = error.code
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert outcome in (RGB.size, (9, 9), ErrorCode.IMAGE_INVALID)
    assert peak < 32 * 2**20 + 8 * len(data)


@pytest.mark.parametrize("name", ["jpeg", "png-rgb", "webp", "gif", "bmp", "tiff-lzw-alpha"])
def test_an_image_cut_anywhere_is_invalid_at_the_latest_when_decoded(name: str) -> None:
    data = IMAGES[name]
    for length in range(0, len(data) * 9 // 10, 97):
        with pytest.raises(RowError) as caught:
            measured_and_decoded(data[:length])
        assert caught.value.code == ErrorCode.IMAGE_INVALID


def tiled_tiff(side: int) -> bytes:
    """One of 9 x 9 pixels, cut from a tile of ``side`` x ``side``."""
    tile = zlib.compress(bytes(side * side))
    tags = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: 0}
    tags |= {324: 8 + 2 + 12 * len(tags) + 4, 325: len(tile)}
    return tiff(*((tag, 4, 1, value) for tag, value in sorted(tags.items()))) + tile


def test_a_tile_counts_as_the_pixels_that_it_is_decoded_to() -> None:
    assert measured_and_decoded(tiled_tiff(64)).size == (9, 9)
    with pytest.raises(RowError) as caught:
        image_size(tiled_tiff(1024), max_pixels=1_000_000)
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE
    assert "1024x1024" in caught.value.message


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + struct.pack(">BH", kind, 2 + len(body)) + body


JPEG, GIF, PNG = (encoded(RGB, kind) for kind in ("JPEG", "GIF", "PNG"))
FIRST_FRAME = GIF.index(b",", 13 + 768)
MANY_PIECES = {
    "jpeg-exif": b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + bytes(40)) * 65 + JPEG[2:],
    "jpeg-empty": b"\xff\xd8" + segment(0xE5, b"") * 4097 + JPEG[2:],
    "jpeg-junk": b"\xff\xd8" + (b"\xff\0\xff\xff" + segment(0xFE, b"")) * 4097 + JPEG[2:],
    "jpeg-behind-an-end": b"\xff\xd8\xff\xd9" + segment(0xE5, b"") * 4097 + JPEG[2:],
    "png": PNG[:33] + chunk(b"tEXt", b"a\0b") * 100_001 + PNG[33:],
    "gif": GIF[:FIRST_FRAME] + b"!\xfe\x01a\0" * 200_001 + GIF[FIRST_FRAME:],
    "gif-one": GIF[:FIRST_FRAME] + b"!\xfe" + b"\x01a" * 200_001 + b"\0" + GIF[FIRST_FRAME:],
    "gif-hidden": GIF[:FIRST_FRAME]
    + b"!\x01\0\x01,\0"
    + b"!\xfe\x01a\0" * 200_001
    + GIF[FIRST_FRAME:],
}


@pytest.mark.parametrize(
    "data", [pytest.param(data, id=name) for name, data in MANY_PIECES.items()]
)
def test_an_image_of_countless_pieces_is_invalid(data: bytes) -> None:
    """Pillow takes minutes for some of these, and memory a hundred times the file's."""
    with pytest.raises(RowError, match="more than") as caught:
        image_size(data, max_pixels=10**6)
    assert caught.value.code == ErrorCode.IMAGE_INVALID


def test_a_jpeg_of_countless_scans_is_invalid() -> None:
    side = 256
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    first, second = (found.start() for found in islice(re.finditer(b"\xff\xda", data), 2))
    many = data[:second] + data[first:second] * 40 + data[second:]
    assert image_size(data, max_pixels=side * side) == (side, side)
    assert image_size(many + JPEG * 40, max_pixels=2 * side * side) == (side, side)
    with pytest.raises(RowError, match="scans of 256x256") as caught:
        image_size(many, max_pixels=side * side)
    assert caught.value.code == ErrorCode.IMAGE_INVALID

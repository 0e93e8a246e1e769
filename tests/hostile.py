"""Rows that mean harm, are broken or just odd, each with the code it must end with.

In: the folder that holds the input (files, links and pipes are made there). Out: ``cases``. A case
is one row of a Parquet file: a request, and its error code, or None if the row is legal after all.
Secrets are planted in some: they may stand in no output.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import ErrorCode as Code

PLANTED = "PLANTEDsecret0123456789"
"""Wherever it occurs in what a run leaves behind, a secret was given away."""
MAX_IMAGE_BYTES = 2_000_000
MAX_IMAGE_PIXELS = 4_000_000
OUTSIDE = "outside.png"
"""A good image beside the input's folder, which no row may reach."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row, and how it must end."""

    name: str
    code: Code | None
    """None: it succeeds."""
    prompt: str | None = "What is it?"
    messages: str | None = None
    images: list[dict[str, Any]] | None = None
    sampling: str | None = None
    also: frozenset[Code] = field(default_factory=frozenset)
    """Codes that would do as well: a sampled text decides."""


def cases(folder: Path) -> list[Case]:
    """All of them; what they refer to is made in ``folder`` and beside it."""
    return [
        *_encoded_images(),
        *_image_uris(folder),
        *_messages(),
        *_parameters(),
        *_odd(),
    ]


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    """A small good image."""
    return _saved("PNG", mode, (width, height))


def _encoded_images() -> Iterator[Case]:
    whole = {kind: _saved(kind, "RGB", (64, 64)) for kind in ("PNG", "JPEG", "WEBP", "BMP")}
    gif, tiff = _saved("GIF", "P", (9, 9)), _saved("TIFF", "RGB", (9, 9))
    yield _image("empty", Code.IMAGE_INVALID, b"")
    yield _image("random-bytes", Code.IMAGE_INVALID, bytes(range(256)) * 40)
    yield _image("pickle", Code.IMAGE_INVALID, pickle.dumps({"a": 1}))
    yield _image("zip", Code.IMAGE_INVALID, _zip())
    yield _image("html", Code.IMAGE_INVALID, b"<html><script>alert(1)</script></html>")
    yield _image("svg", Code.IMAGE_INVALID, b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    yield _image("pdf", Code.IMAGE_INVALID, b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj")
    yield _image("postscript", Code.IMAGE_INVALID, _POSTSCRIPT)
    yield _image("icon", Code.IMAGE_INVALID, _saved("ICO", "RGBA", (16, 16)))
    yield _image("photoshop", Code.IMAGE_INVALID, b"8BPS\0\1" + bytes(40))
    yield _image("pcx", Code.IMAGE_INVALID, _saved("PCX", "RGB", (9, 9)))
    yield _image("png-signature-alone", Code.IMAGE_INVALID, whole["PNG"][:8])
    for kind, data in whole.items():
        yield _image(f"half-a-{kind.lower()}", Code.IMAGE_INVALID, data[: len(data) // 2])
    yield _image("half-a-gif", Code.IMAGE_INVALID, gif[:20])
    yield _image("half-a-tiff", Code.IMAGE_INVALID, tiff[: len(tiff) // 2])
    yield _image("png-with-a-wrong-checksum", Code.IMAGE_INVALID, _flip(whole["PNG"], -20))
    yield _image("png-header-of-60000-squared", Code.IMAGE_TOO_LARGE, _png_header(60_000, 60_000))
    yield _image("png-header-of-2-to-the-31", Code.IMAGE_TOO_LARGE, _png_header(2**31 - 1, 1))
    yield _image("bomb-of-20000-squared", Code.IMAGE_TOO_LARGE, png(20_000, 20_000, "1"))
    yield _image("gif-screen-of-65535-squared", Code.IMAGE_TOO_LARGE, _huge_gif())
    yield _image("bmp-header-of-60000-squared", Code.IMAGE_TOO_LARGE, _huge_bmp(whole["BMP"]))
    yield _image("text-chunk-bomb", Code.IMAGE_INVALID, _png_with_text_bomb())
    yield _image("tiff-directory-loop", Code.IMAGE_INVALID, _tiff_loop())
    yield _image("more-bytes-than-allowed", Code.IMAGE_TOO_LARGE, png() + bytes(MAX_IMAGE_BYTES))
    yield _image("gif-and-html-at-once", None, gif + b"<script>alert(1)</script>")
    yield _image("jpeg-and-zip-at-once", None, whole["JPEG"] + _zip())
    yield _image("one-pixel", None, png(1, 1))
    yield _image("one-by-ten-thousand", None, png(1, 10_000))
    yield _image("sixteen-bit", None, _saved("PNG", "I;16", (9, 9)))
    yield _image("cmyk", None, _saved("JPEG", "CMYK", (9, 9)))
    yield Case("null-image", Code.IMAGE_INVALID, images=[{"bytes": None, "path": None}])


def _image_uris(folder: Path) -> Iterator[Case]:
    (folder / "good.png").write_bytes(png())
    (folder / "a folder").mkdir()
    (folder.parent / OUTSIDE).write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / OUTSIDE)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "passwd.png").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.png")
    (folder / "large.png").write_bytes(png() + bytes(MAX_IMAGE_BYTES))
    outside = folder.parent / OUTSIDE
    forbidden = {
        "parent": f"../{OUTSIDE}",
        "parent-in-the-middle": f"a folder/../../{OUTSIDE}",
        "absolute-path": str(outside),
        "file-uri": f"file://{outside}",
        "link-out": "link.png",
        "link-to-a-device": "zero.png",
        "link-to-passwd": "passwd.png",
        "other-store": f"s3://elsewhere/x.png?X-Amz-Signature={PLANTED}",
        "google": "gs://elsewhere/x.png",
        "web": f"https://example.com/x.png?token={PLANTED}",
        "web-with-a-password": f"https://me:{PLANTED}@example.com/x.png",
        "metadata": "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "loopback": "http://127.0.0.1:8333/",
        "loopback-by-name": "http://localhost:8265/api/jobs/",
        "loopback-in-ipv6": "http://[::1]:8265/",
        "loopback-as-a-number": "http://2130706433/",
        "loopback-in-hex": "http://0x7f.1/",
        "mapped-ipv6": "http://[::ffff:169.254.169.254]/",
        "ftp": "ftp://example.com/x.png",
        "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
        "nul": "good.png\0.txt",
    }
    for name, uri in forbidden.items():
        yield _uri(f"uri-{name}", Code.IMAGE_FORBIDDEN, uri)
    not_found = {
        "missing": "missing.png",
        "encoded-parent": f"%2e%2e/{OUTSIDE}",
        "backslashes": f"..\\{OUTSIDE}",
    }
    for name, uri in not_found.items():
        yield _uri(f"uri-{name}", Code.IMAGE_NOT_FOUND, uri)
    yield _uri("uri-good", None, "good.png")
    yield _uri("uri-too-large", Code.IMAGE_TOO_LARGE, "large.png")
    yield _uri("uri-a-folder", Code.IMAGE_FORBIDDEN, "a folder")
    yield _uri("uri-a-pipe", Code.IMAGE_FORBIDDEN, "pipe.png")
    one_part = {"type": "image_url", "image_url": {"url": "x" * 1_000_000}}
    content = [{"role": "user", "content": [one_part]}]
    yield _chat("uri-of-a-megabyte", Code.IMAGE_FORBIDDEN, content)
    yield _uri("uri-too-long", Code.IMAGE_FORBIDDEN, "x" * 10_000)
    for name, url, code in [
        ("bad-base64", "data:image/png;base64,!!!!", Code.IMAGE_INVALID),
        ("base64-beyond-ascii", "data:image/png;base64,\u00e9", Code.IMAGE_INVALID),
        ("html", "data:text/html;base64," + base64.b64encode(b"<p>").decode(), Code.IMAGE_INVALID),
        ("not-base64", "data:image/png,abc", Code.INVALID_MESSAGES),
        ("web", f"http://169.254.169.254/x?{PLANTED}", Code.IMAGE_FORBIDDEN),
        ("no-url", None, Code.INVALID_MESSAGES),
    ]:
        part = {"type": "image_url", "image_url": {"url": url}}
        yield _chat(f"part-{name}", code, [{"role": "user", "content": [part]}])


def _messages() -> Iterator[Case]:
    code = Code.INVALID_MESSAGES
    yield Case("no-request", code, prompt=None)
    yield Case("empty-prompt", code, prompt="")
    yield Case("both", code, prompt="a", messages='[{"role": "user", "content": "b"}]')
    yield Case("both-alike", None, prompt="a", messages='[{"role": "user", "content": "a"}]')
    yield Case("not-json", code, prompt=None, messages="{")
    yield Case("a-hundred-thousand-brackets", code, prompt=None, messages="[" * 100_000)
    yield _chat(
        "an-image-in-a-text-part",
        code,
        [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "x.png"}]}],
    )
    yield Case("a-number", code, prompt=None, messages="7")
    yield _chat("no-messages", code, [])
    yield _chat("unknown-role", code, [{"role": "root", "content": "a"}])
    yield _chat("content-a-number", code, [{"role": "user", "content": 7}])
    yield _chat("unknown-part", code, [{"role": "user", "content": [{"type": "exec"}]}])
    yield _chat("more-images-than-given", code, [{"role": "user", "content": [{"type": "image"}]}])
    yield _chat("lone-surrogate", code, [{"role": "user", "content": "\ud800"}])
    yield Case("reserved-token", code, prompt="look: <|image|>")
    yield Case("reserved-patch-token", code, prompt="<|patch|>" * 4)
    yield Case("fewer-parts-than-images", code, None, _USER, [{"bytes": png(), "path": None}])
    yield Case("five-million-characters", Code.CONTEXT_LENGTH_EXCEEDED, prompt="go " * 1_700_000)
    yield Case("one-word-of-a-megabyte", Code.CONTEXT_LENGTH_EXCEEDED, prompt="a" * 1_000_000)
    yield Case("nul", None, prompt="a\0b")
    yield Case("blanks", None, prompt="   ")
    yield Case("template-in-a-prompt", None, prompt="{{ 7 * 7 }}{% for a in b %}")


def _parameters() -> Iterator[Case]:
    code = Code.INVALID_PARAMETER
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"items": deep}
    wrong: dict[str, Any] = {
        "temperature-nan": {"temperature": float("nan")},
        "temperature-high": {"temperature": 1e308},
        "n-of-a-billion": {"n": 10**9},
        "no-tokens": {"max_completion_tokens": 0},
        "seed-too-large": {"seed": 2**64},
        "too-many-stops": {"stop": [str(number) for number in range(33)]},
        "unknown": {"__class__": "os.system"},
        "bias-beyond-the-vocabulary": {"logit_bias": {"999999": 1}},
        "schema-that-refers-to-the-web": _json({"$ref": "http://169.254.169.254/"}),
        "schema-that-refers-to-a-file": _json({"$ref": "file:///etc/passwd"}),
        "schema-too-deep": _json(deep),
        "schema-that-explodes": _json(_doubling()),
        "schema-that-is-none": _json({"type": "strin"}),
        "schema-of-a-megabyte": _json({"description": "x" * 1_000_000}),
        "pattern-that-is-none": {"structured_outputs": {"regex": "[a"}},
        "pattern-that-explodes": {"structured_outputs": {"regex": "(a{1,1000}){1,1000}"}},
        "no-choice": {"structured_outputs": {"choice": []}},
        "two-structures": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "two-formats": {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
    }
    for name, given in wrong.items():
        yield Case(f"sampling-{name}", code, sampling=json.dumps(given))
    yield Case("sampling-not-json", code, sampling="{{{{")
    yield Case("sampling-a-list", code, sampling="[1]")
    yield Case("sampling-of-brackets", code, sampling="[" * 100_000)
    yield Case("sampling-huge-number", code, sampling='{"n": 1' + "0" * 5_000 + "}")
    yield Case(
        "grammar-that-is-none",
        Code.ENGINE_REJECTED,
        sampling=json.dumps({"structured_outputs": {"grammar": "root ::= ((("}}),
    )
    yield Case(
        "pattern-that-would-backtrack",
        None,
        sampling=json.dumps({"structured_outputs": {"regex": "(a+)+b"}}),
        also=frozenset({Code.LENGTH}),
    )


def _odd() -> Iterator[Case]:
    """Legal, but for the last: the engine's profile allows 8 images."""
    one = {"bytes": png(56, 56), "path": None}
    yield Case("two-samples", None, "Count to 3.", sampling='{"n": 2, "seed": 5}')
    yield Case("a-stop-string", None, "Count to 9.", sampling='{"stop": ["4"]}')
    yield Case(
        "a-huge-limit", None, "Count to 3.", sampling='{"max_completion_tokens": 2147483647}'
    )
    yield Case("eight-images", None, images=[one] * 8)
    yield Case("nine-images", Code.INVALID_MESSAGES, images=[one] * 9)


_USER = '[{"role": "user", "content": "no image part"}]'
_POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n"


def _doubling() -> dict[str, Any]:
    """Forty definitions that refer twice to the next: 2 kB, and 2^40 checks."""
    twice = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    return {"$ref": "#/$defs/a0", "$defs": {**twice, "a40": {}}}


def _json(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def _image(name: str, code: Code | None, data: bytes) -> Case:
    return Case(f"image-{name}", code, images=[{"bytes": data, "path": None}])


def _uri(name: str, code: Code | None, uri: str) -> Case:
    return Case(name, code, images=[{"bytes": None, "path": uri}])


def _chat(name: str, code: Code | None, turns: list[dict[str, Any]]) -> Case:
    return Case(f"chat-{name}", code, prompt=None, messages=json.dumps(turns))


def _saved(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, 1).save(sink, kind)
    return sink.getvalue()


def _flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("evil.sh", "rm -rf /")
    return sink.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")


def _png_with_text_bomb() -> bytes:
    """A text chunk of 100 KB that unpacks to 100 MB, before the pixels."""
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    good = png()
    return good[:33] + text + good[33:]


def _huge_gif() -> bytes:
    gif = bytearray(_saved("GIF", "P", (9, 9)))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(gif)


def _huge_bmp(good: bytes) -> bytes:
    return good[:18] + struct.pack("<ii", 60_000, 60_000) + good[26:]


def _tiff_loop() -> bytes:
    """A directory without entries whose next one is itself."""
    return b"II*\0" + struct.pack("<IHI", 8, 0, 8)

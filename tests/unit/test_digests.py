"""Digests of prompts and completions: stable, and told apart by every id and every image byte."""

from hashlib import blake2b

from pipeline.digests import digest_image, digest_tokens


def test_the_digest_is_what_the_documentation_says() -> None:
    ids, image = [1, 200_080], b"png"
    written = b"\x01\x00\x00\x00\x90\x0d\x03\x00" + (3).to_bytes(8, "little") + image
    assert digest_tokens(ids, [image]) == blake2b(written, digest_size=16).hexdigest()
    assert digest_tokens([]) == blake2b(digest_size=16).hexdigest()


def test_every_id_image_and_border_between_images_counts() -> None:
    digests = {
        digest_tokens([1, 2]),
        digest_tokens([2, 1]),
        digest_tokens([1, 2, 0]),
        digest_tokens([1, 2], [b"ab"]),
        digest_tokens([1, 2], [b"a", b"b"]),
        digest_tokens([1, 2], [b"b", b"a"]),
    }
    assert len(digests) == 6


def test_an_image_is_known_by_its_bytes() -> None:
    assert digest_image(b"png") == blake2b(b"png", digest_size=16).hexdigest()
    assert digest_image(b"png") != digest_image(b"pnh")

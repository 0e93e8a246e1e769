"""Redaction: no secret in text or manifests, and nothing else taken out."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline import redact

SECRET = "s3cr3t-PLANTED-value"


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s3://b/x.png?X-Amz-Signature=abc&y=1", "s3://b/x.png?***"),
        ("see https://me:pw@host/x now", "see https://host/x now"),
        ("'https://host/?token=abc', too", "'https://host/?***', too"),
        ("https://host/x?abc", "https://host/x?***"),
        ("Authorization: Bearer abcdefghij.k", "Authorization: Bearer ***"),
        ("glob s3://b/part-?.parquet stays", "glob s3://b/part-?.parquet stays"),
        ("what? a=b stays", "what? a=b stays"),
        ("me@example.com stays", "me@example.com stays"),
        ("temperature = 3: must be <= 2", "temperature = 3: must be <= 2"),
    ],
)
def test_urls_lose_user_and_query_and_the_rest_stays(given: str, told: str) -> None:
    assert redact.text(given) == told


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "MY_DB_PASSWORD"],
)
def test_what_the_environment_holds_in_secret_is_masked(name: str) -> None:
    with environment(**{name: SECRET}):
        assert redact.text(f"refused: key {SECRET}!") == "refused: key ***!"


def test_short_and_public_values_of_the_environment_stay() -> None:
    with environment(HF_TOKEN="batch", USER_NAME="somebody-long"):
        assert redact.text("batch of somebody-long") == "batch of somebody-long"


def test_a_manifest_loses_what_has_a_secret_name_at_any_depth() -> None:
    document = {
        "api_key": "x",
        "a": [{"db_password": "y"}],
        "tokens": ["kept"],
        "auth_token": ["z"],
        "max_tokens": 5,
        "token": "",
        "uri": "s3://me:pw@b/in?sig=1",
    }
    assert redact.manifest(document) == {
        "api_key": "***",
        "a": [{"db_password": "***"}],
        "tokens": ["kept"],
        "auth_token": ["***"],
        "max_tokens": 5,
        "token": "",
        "uri": "s3://b/in?***",
    }


def test_a_log_line_loses_secrets_of_arguments_and_tracebacks() -> None:
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(redact.RedactingFormatter("%(message)s"))
    logger = logging.getLogger("test.redact")
    logger.addHandler(handler)
    with environment(HF_TOKEN=SECRET):
        try:
            raise ValueError(f"https://h/?key={SECRET}")
        except ValueError:
            logger.exception("cannot get %s", f"https://h/x?key={SECRET}")
    assert SECRET not in sink.getvalue()
    assert "cannot get https://h/x?***" in sink.getvalue()
    assert "ValueError" in sink.getvalue()

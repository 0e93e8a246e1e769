"""pipeline.redact: planted secrets do not come through any of the choke points."""

from __future__ import annotations

import json
import logging

import pytest

from jobs.cli import job_parser, run_job
from pipeline.errors import StorageError
from pipeline.redact import RedactingFormatter, redacted_text

PLANTED = "planted/Secret+0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"cannot read https://host/a.png?X-Amz-Signature={PLANTED}",
        f"cannot read https://user:{PLANTED.replace('/', '')}@host/a.png",
        f"cannot read s3://user:{PLANTED.replace('/', '')}@bucket/a.png",
        f"cannot read a.png?size=2&sig={PLANTED}",
        f"cannot read HTTPS://host/a.png?{PLANTED}",
        f"Authorization: Bearer {PLANTED}",
        f"request with X-Amz-Credential={PLANTED}",
        "InvalidAccessKeyId: AKIAPLANTED012345678",
        "token hf_plantedplantedplantedplanted",
    ],
)
def test_a_secret_in_a_message_is_masked(text: str) -> None:
    shown = redacted_text(text, {})
    assert "lanted" not in shown
    assert "PLANTED" not in shown
    assert "***" in shown


def test_secrets_of_the_environment_are_masked_plain_and_quoted() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": PLANTED, "RAY_AUTH_TOKEN": "ray-planted-1"}
    text = f"{PLANTED} planted%2FSecret%2B0123456789 ray-planted-1"
    assert redacted_text(text, environment) == "*** *** ***"


def test_what_is_no_secret_stays_to_the_letter() -> None:
    text = "s3://in/part-?.parquet: max_tokens=5, the prompt has 9 tokens: a@b.c, us-east-1"
    assert redacted_text(text, {"AWS_REGION": "us-east-1", "KEY_TOKEN": "tokens"}) == text


def test_tracebacks_in_the_log_are_redacted() -> None:
    try:
        raise ValueError(f"https://host/?sig={PLANTED}")
    except ValueError as error:
        raised = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "of %s", (f"?sig={PLANTED}",), raised)
    line = RedactingFormatter("%(message)s").format(record)
    assert "Traceback" in line
    assert PLANTED not in line


def test_the_last_line_and_the_error_on_stderr_are_redacted(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def job(_: object) -> object:
        raise StorageError(f"cannot read https://host/a?token={PLANTED}")

    run_job(job, job_parser("jobs.x", "", ""), ["--config", "x"])  # type: ignore[arg-type]
    out, err = capfd.readouterr()
    assert json.loads(out)["error"] == "cannot read https://host/a?***"
    assert "cannot read" in err
    assert PLANTED not in out + err


@pytest.mark.parametrize(
    "text",
    [
        "key sk-proj-PLANTED0123456789",
        "key ghp_PLANTED0123456789",
        "https://user:pa/PLANTED0123456789@host/x",
        '{"api_key": "PLANTED0123456789"}',
        "password: PLANTED0123456789",
        "x-token=PLANTED0123456789",
        "http://http://host/a?PLANTED0123456789",
        f"https://{'a:' * 2000}PLANTED0123456789@host/x",
    ],
)
def test_keys_of_known_shapes_are_masked(text: str) -> None:
    assert "PLANTED" not in redacted_text(text)

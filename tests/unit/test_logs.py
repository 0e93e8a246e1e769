"""Structured logs: one JSON object a line that says where, without secrets; text by default.

In processes of their own: logging is set up once in each.
"""

import json
import os
import subprocess
import sys
from typing import Any

LINES = """
import asyncio, logging, threading
from pipeline import logs
from pipeline.redact import configure_logging
configure_logging(logging.INFO, "%(levelname)s %(name)s: %(message)s")
logs.name_process(run="nightly", replica="1f2e3d4c")
log = logging.getLogger("pipeline.test")
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
async def work():
    log.info("on the loop")
with logs.about(shard=7):
    log.info("wrote %s", 3)
    asyncio.run_coroutine_threadsafe(work(), loop).result()
log.warning("to https://user:hunter2@host/x?sig=abc with %s", "s3cr3t-of-the-env")
try:
    raise ValueError("key=s3cr3t-of-the-env")
except ValueError:
    log.exception("failed")
"""


def logged(**variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "LOG_FORMAT"}
    environment = {**kept, "MY_API_KEY": "s3cr3t-of-the-env", **variables}
    done = subprocess.run(
        [sys.executable, "-c", LINES], capture_output=True, text=True, check=True, env=environment
    )
    return done.stderr


def test_json_lines_say_run_replica_and_the_shard_of_their_thread() -> None:
    lines: list[dict[str, Any]] = [json.loads(x) for x in logged(LOG_FORMAT="json").splitlines()]
    first, on_the_loop, *_ = lines
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "pipeline.test",
        "message": "wrote 3",
        "run": "nightly",
        "replica": "1f2e3d4c",
        "shard": 7,
    }
    assert "shard" not in on_the_loop
    assert [line["level"] for line in lines] == ["INFO", "INFO", "WARNING", "ERROR"]


def test_json_lines_hold_the_traceback_and_no_secret() -> None:
    text = logged(LOG_FORMAT="json")
    assert not any(secret in text for secret in ("s3cr3t", "hunter2", "sig=abc"))
    failed = json.loads(text.splitlines()[-1])
    assert "ValueError: key=***" in failed["traceback"]
    assert failed["message"] == "failed"


def test_logs_are_text_unless_json_is_asked_for() -> None:
    assert logged().splitlines()[0] == "INFO pipeline.test: wrote 3"

"""The feed: each distinct request of an evaluation once, as a line of OpenAI batch JSONL.

In: requests, in the order in which tasks ask them. Out: one object, named after its content, below
the run folder. The line's ``custom_id`` is a digest of the request, so that whoever asks the same
again finds the one answer, and the derived seed is the same in any run with the same run seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline import storage
from pipeline.openai_input import Endpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Request:
    """One request: where to, and its body without the model, which is the run's."""

    endpoint: Endpoint
    body: Mapping[str, Any]

    @cached_property
    def custom_id(self) -> str:
        """A digest of all that decides the completion but model and run seed."""
        text = json.dumps([self.endpoint, self.body], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def line(self) -> bytes:
        """The request as a line of the feed."""
        line = {
            "custom_id": self.custom_id,
            "method": "POST",
            "url": self.endpoint,
            "body": self.body,
        }
        return (json.dumps(line) + "\n").encode()


class Feed:
    """The distinct requests of an evaluation."""

    def __init__(self) -> None:
        self.asked = 0
        """Requests before equal ones became one."""
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def saved(self) -> int:
        """Requests that need no generation of their own."""
        return self.asked - len(self)

    def add(self, request: Request) -> None:
        """Take a request in, unless the same one is there."""
        self.asked += 1
        self._requests.setdefault(request.custom_id, request)

    @property
    def name(self) -> str:
        """Of its object: the same requests in the same order have the same."""
        ids = "".join(self._requests)
        return f"{hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()}.jsonl"

    def uri(self, run_folder: str) -> str:
        """Where the feed of a run belongs."""
        return storage.join(run_folder, "_feed", self.name)

    def write(self, uri: str) -> None:
        """Write the feed, unless it is there: a run goes on with the very object it began with.

        Raises:
            StorageError: it cannot be written.
        """
        if storage.exists(uri):
            return
        with storage.open_output(uri) as add:
            for request in self._requests.values():
                add(request.line())
        log.info("%d requests are in %s", len(self), uri)

"""Where this environment's own copy of the project lies.

A job runs from a copy of the submitter's tree (``ray job submit --working-dir .``),
without what ``.rayignore`` names. Data that is large and the same for everyone, as mini-Maverick's
weights, is looked for in the installed project instead.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_DISTRIBUTION = "maverick-batch"


@lru_cache(maxsize=1)
def installed_tree() -> Path | None:
    """The checkout of an install in place (``pip install -e``), else the folder that holds
    ``pipeline`` and ``cluster``; None where the project is not installed."""
    try:
        found = distribution(_DISTRIBUTION)
    except PackageNotFoundError:
        return None
    origin = json.loads(found.read_text("direct_url.json") or "{}")  # PEP 610
    if origin.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(origin["url"]).path))
    return Path(str(found.locate_file("")))

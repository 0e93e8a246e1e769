"""Makes ``tests/data/kubernetes/kubernetes.json``: what Kubernetes checks of the objects used here.

``python tests/record_kubernetes_schema.py VERSION``, where the package kubernetes-validate is
installed (it is no dependency: 100 MB of schemas). Descriptions are left out, and definitions that
no object in ``cluster/kuberay/`` can reach.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

_TARGET = Path(__file__).parent / "data" / "kubernetes" / "kubernetes.json"
_USED = (
    "io.k8s.api.batch.v1.Job",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.scheduling.v1.PriorityClass",
)
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_QUANTITY_FORM = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
"""As the API server parses it; the published schemas only say that it is a string."""


def main() -> None:
    """Write the definitions that ``_USED`` reach."""
    (version,) = sys.argv[1:]
    package = files("kubernetes_validate") / "kubernetes-json-schema"
    source = package / f"v{version}-local-strict" / "_definitions.json"
    document = json.loads(source.read_text(encoding="utf-8"))
    known = document["$defs"]
    reached: dict[str, Any] = {}
    ahead = list(_USED)
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached[name] = without_descriptions(known[name])
            ahead += references(reached[name])
    reached[_QUANTITY] = {
        "anyOf": [{"type": "string", "pattern": _QUANTITY_FORM}, {"type": "number"}]
    }
    slim = {"$id": document["$id"], "$schema": document["$schema"], "$defs": reached}
    _TARGET.write_text(json.dumps(slim, separators=(",", ":"), sort_keys=True) + "\n")


def without_descriptions(schema: Any) -> Any:
    """The schema without its words; a property may well be named ``description``."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_descriptions(value)
        for key, value in schema.items()
        if not (key == "description" and isinstance(value, str))
    }


def references(schema: Any) -> list[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return [name for item in schema for name in references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].rpartition("/")[2]] if isinstance(schema.get("$ref"), str) else []
    return own + [name for value in schema.values() for name in references(value)]


if __name__ == "__main__":
    main()

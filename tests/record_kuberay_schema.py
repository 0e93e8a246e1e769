"""Make ``tests/data/kubernetes/kuberay.json`` from KubeRay's own custom resource definitions.

``python -m tests.record_kuberay_schema FOLDER VERSION``, where ``FOLDER`` holds the definitions as
JSON (``rayclusters.json``, ``rayjobs.json``), of KubeRay ``VERSION``. Descriptions are left out, a
schema that repeats is written once, and unknown fields are refused, as ``kubectl apply`` refuses
them. Pod templates are checked with Kubernetes' definitions as well, which know their metadata.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.record_kubernetes_schema import without_descriptions

_TARGET = Path(__file__).parent / "data" / "kubernetes" / "kuberay.json"
_KINDS = ("rayclusters", "rayjobs")
_KUBERNETES = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s"
_METADATA = {"$ref": f"{_KUBERNETES}.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
_POD_TEMPLATE = {"$ref": f"{_KUBERNETES}.api.core.v1.PodTemplateSpec"}
_SHARED_CHARACTERS = 2000
"""Length of a schema's JSON from which it is written once and referred to."""


def main() -> None:
    """Write the schemas of ``_KINDS``."""
    folder, version = sys.argv[1:]
    definitions: dict[str, Any] = {}
    for name in _KINDS:
        document = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        (served,) = document["spec"]["versions"]
        kind = document["spec"]["names"]["kind"]
        schema = strict(without_descriptions(served["schema"]["openAPIV3Schema"]))
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        schema["properties"] |= {"kind": {"const": kind}, "apiVersion": {"const": "ray.io/v1"}}
        del schema["properties"]["status"]  # the operator's to write
        schema["properties"]["metadata"] = _METADATA
        definitions[kind] = shared(schema, definitions)
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://ray.io/v1",
        "$comment": f"RayCluster and RayJob of KubeRay {version}; see README.md",
        "$defs": definitions,
    }
    _TARGET.write_text(json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n")


def strict(schema: Any) -> Any:
    """The schema as JSON Schema, with unknown fields refused."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
        if "containers" in schema["properties"].get("spec", {}).get("properties", {}):
            made["properties"]["metadata"] = True  # only Kubernetes' own definition describes it
            return {"allOf": [made, _POD_TEMPLATE]}
    return made


def shared(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with each long one inside moved to ``definitions``."""
    if isinstance(schema, list):
        return [shared(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: shared(value, definitions) for key, value in schema.items()}
    text = json.dumps(made, separators=(",", ":"), sort_keys=True)
    if not isinstance(schema.get("type"), str) or len(text) < _SHARED_CHARACTERS:
        return made
    known = {json.dumps(of, sort_keys=True): name for name, of in definitions.items()}
    name = known.get(json.dumps(made, sort_keys=True), f"shared-{len(definitions)}")
    definitions[name] = made
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    main()

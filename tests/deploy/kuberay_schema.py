"""Makes kuberay_rayservice.json of KubeRay's own CRD, and reads it.

    python -m tests.deploy.kuberay_schema ray.io_rayservices.yaml      # of github.com/ray-project/kuberay, a release

The file is a part of KubeRay (Apache-2.0, as this repository): the schema of a RayService of version v1 without
descriptions and status, its repeated parts (a pod's, above all) written once. Unknown keys, which the API server drops
in silence, are errors here.
"""

import collections
import json
import sys
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("kuberay_rayservice.json")
_MIN_CHARACTERS = 200


def main(crd: str) -> None:
    definition = yaml.safe_load(Path(crd).read_text())
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    schema = _strict(schema)
    times = collections.Counter(_written(part) for part in _parts(schema))
    names = {text: f"d{i}" for i, text in enumerate(t for t, n in times.items() if n > 1 and len(t) > _MIN_CHARACTERS)}
    found = _with_references(schema, names, whole=True)
    found["$defs"] = {name: _with_references(json.loads(text), names, whole=True) for text, name in names.items()}
    FILE.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


def _strict(schema):
    """Of a structural schema as JSON Schema has it; `metadata` and what says so keep unknown keys."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _strict(part) for key, part in schema.items()
        if not key.startswith("x-") and (key not in ("description", "format", "default") or isinstance(part, dict))
    }  # fmt: skip
    if "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        kept["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return kept


def _written(part) -> str:
    return json.dumps(part, separators=(",", ":"), sort_keys=True)


def _parts(schema):
    if isinstance(schema, dict) and isinstance(schema.get("type"), str):  # else a map of names to schemas
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _parts(part)


def _with_references(schema, names, whole=False):
    if isinstance(schema, list):
        return [_with_references(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if not whole and isinstance(schema.get("type"), str) and (name := names.get(_written(schema))):
        return {"$ref": f"#/$defs/{name}"}
    return {key: _with_references(part, names) for key, part in schema.items()}


if __name__ == "__main__":
    main(sys.argv[1])

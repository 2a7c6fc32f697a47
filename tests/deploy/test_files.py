"""The files of deploy/ held to the schemas of those who read them. Run for real: the other tests here."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from pregate.base.options import of_keys
from pregate.cluster import local_ray
from pregate.cluster.serve_app import AppOptions
from tests.deploy.kuberay_schema import FILE as RAY_SERVICE_SCHEMA

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CLUSTERS = ["ray-cluster.yaml", "ray-cluster-local.yaml"]


def read(path: str):
    return yaml.safe_load((DEPLOY / path).read_text())


def args_of(config) -> AppOptions:
    """The application's options, as `build_app` reads them; unknown keys are errors."""
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "pregate.cluster.serve_app:build_app"
    return of_keys(AppOptions, application.args)


def built(overlay: str) -> list:
    """The manifests of an overlay, as `kubectl kustomize` writes them."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster_file(name):
    config = prepare_config(read(name))
    validate_config(config)
    broken = config | {"head_start_command": []}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(broken)


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_starts_ray_as_pregate_would(name):
    """With a token, at our niceness and without idle processes; metrics stay on: a cluster has who reads them."""
    wanted = {f"{k}={v}" for k, v in local_ray._RAY_ENVIRONMENT.items() if k.startswith(("RAY_AUTH", "RAY_worker",
              "RAY_prestart", "RAY_enable_worker", "RAY_SERVE"))}  # fmt: skip
    config = read(name)
    for role in ("head", "worker"):
        stop, start = config[f"{role}_start_ray_commands"]
        assert stop == "ray stop"
        assert wanted <= set(re.split(r"[ ;]", start)), role
        assert "--disable-usage-stats" in start


def test_the_new_autoscaler_is_off_on_premises_where_it_starts_no_worker():
    assert "RAY_enable_autoscaler_v2=0" in read("ray-cluster-local.yaml")["head_start_ray_commands"][1]


def test_serve_takes_the_serve_config():
    assert args_of(read("serve.yaml")).deployment.hosts == 2
    assert read("serve.yaml")["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("overlay", ["base", "cpu", "gpu"])
def test_kuberay_takes_the_ray_service(overlay):
    schema = json.loads(RAY_SERVICE_SCHEMA.read_text())
    documents = [read("kubernetes/base/rayservice.yaml")] if overlay == "base" else built(overlay)
    (service,) = (d for d in documents if d["kind"] == "RayService")
    jsonschema.validate(service, schema)
    cluster = service["spec"]["rayClusterConfig"]
    options = args_of(yaml.safe_load(service["spec"]["serveConfigV2"])).deployment
    (workers,) = cluster["workerGroupSpecs"]
    containers = [g["template"]["spec"]["containers"][0] for g in (cluster["headGroupSpec"], workers)]
    assert cluster["authOptions"] == {"mode": "token"}
    assert all(c["resources"]["limits"]["memory"] == c["resources"]["requests"]["memory"] for c in containers)
    if overlay == "base":
        return
    assert {c["image"] for c in containers} == {
        f"registry.example.com/pregate:0.1.0-{'cuda' if overlay == 'gpu' else 'cpu'}"
    }
    gpus = containers[1]["resources"]["limits"].get("nvidia.com/gpu", 0)
    asked = options.engine_gpus + options.hosts * options.gpus_per_host
    assert workers["replicas"] * gpus >= asked == (3 if overlay == "gpu" else 0)


def test_a_key_that_kuberay_would_drop_is_found():
    service = read("kubernetes/base/rayservice.yaml")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(service, json.loads(RAY_SERVICE_SCHEMA.read_text()))


def test_versions_agree():
    """Of Ray and torch, in whatever names them: skew between nodes is the classic failure."""
    texts = {path: path.read_text() for path in DEPLOY.rglob("*") if path.is_file()}
    rays = {
        m for text in texts.values() for m in re.findall(r"ray\[default,serve\]==([\d.]+)|rayVersion: \"([\d.]+)", text)
    }
    torches = {m for text in texts.values() for m in re.findall(r"torch==([\d.]+)", text)}
    assert len({a or b for a, b in rays}) == 1
    assert torches == set(re.findall(r"^TORCH := ([\d.]+)", (ROOT / "Makefile").read_text(), re.M))


def test_the_dockerfile_is_clean():
    linter = shutil.which("hadolint", path=f"{ROOT / '.venv/bin'}:/usr/local/bin:/usr/bin")
    if linter is None:
        pytest.skip("no hadolint: pip install '.[dev]'")
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_it_must():
    text = (DEPLOY / "Dockerfile").read_text()
    targets = dict(
        re.findall(r"^FROM common AS (\w+)\n(.*?)(?=^FROM|\Z)", re.sub("^#.*\n", "", text, flags=re.M), re.M | re.S)
    )
    assert targets.keys() == {"cpu", "cuda"}
    for body in targets.values():
        assert body.rstrip().splitlines()[-1].startswith("USER 1000"), "not run as root"
    assert "HEALTHCHECK" in text
    for path in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M):
        for name in path.split():
            assert (ROOT / name).exists(), name
            assert f"!{name}" in (DEPLOY / "Dockerfile.dockerignore").read_text(), name

"""The manifests of deploy/: their schemas, how they fit together, and the flags they give."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
# The oldest that knows all that is used, and the newest whose schemas are at hand.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
LWS_SCHEMA = json.loads((ROOT / "tests/support/leaderworkerset.schema.json").read_text())

COMPONENT = "app.kubernetes.io/component"
MULTIHOST = sorted((DEPLOY / "multihost").glob("*.yaml"))


def read(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def built(directory: str) -> list[dict]:
    """What `kustomize build` makes: here, of resources and JSON patches, which are all we use."""
    path = DEPLOY / directory
    (kustomization,) = read(path / "kustomization.yaml")
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}
    objects = []
    for name in kustomization["resources"]:
        objects += built(f"{directory}/{name}") if (path / name).is_dir() else read(path / name)
    for each in kustomization.get("patches", ()):
        targets = [one for one in objects if is_target(one, **each["target"])]
        assert targets, f"{each['target']} selects nothing"
        for target in targets:
            patch(target, yaml.safe_load(each["patch"]))
    return objects


def is_target(one: dict, kind: str, name: str) -> bool:
    return one["kind"] == kind and bool(re.fullmatch(name, one["metadata"]["name"]))


def patch(target: dict, operations: list[dict]) -> None:
    """A JSON patch of objects, RFC 6902."""
    for operation in operations:
        *way, last = [
            key.replace("~1", "/").replace("~0", "~") for key in operation["path"].split("/")[1:]
        ]
        at: Any = target
        for key in way:
            at = at[int(key) if isinstance(at, list) else key]
        if operation["op"] == "remove":
            del at[last]
            continue
        assert operation["op"] == "add"
        if last == "-":
            at.append(operation["value"])
        else:
            at[last] = operation["value"]


VARIANTS = {
    **{name: built(name) for name in ("base", "keys", "spare", "tpu")},
    **{path.stem: read(path) for path in MULTIHOST},
}
OBJECTS = [
    pytest.param(one, id=f"{variant}-{one['kind']}-{one['metadata']['name']}")
    for variant, objects in VARIANTS.items()
    for one in objects
]


def templates(one: dict) -> Iterator[dict]:
    """Of pods."""
    spec = one.get("spec", {})
    if one["kind"] == "LeaderWorkerSet":
        yield spec["leaderWorkerTemplate"]["leaderTemplate"]
        yield spec["leaderWorkerTemplate"]["workerTemplate"]
    elif "template" in spec:
        yield spec["template"]


ALL = [
    pytest.param(template, id=f"{variant}-{template['metadata']['labels'][COMPONENT]}")
    for variant, objects in VARIANTS.items()
    for one in objects
    for template in templates(one)
]


def validate(one: dict, version: str) -> None:
    if one["kind"] == "LeaderWorkerSet":
        jsonschema.validate(one, LWS_SCHEMA)
        for template in templates(one):
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            kubernetes_validate.validate(wrapped, version, strict=True)
    else:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("one", OBJECTS)
def test_it_is_of_its_schema(one, version):
    validate(one, version)


@pytest.mark.parametrize("path", [("replicas",), ("template", "spec", "containers", 0, "args")])
def test_the_validator_would_notice(path):
    (one,) = (copy.deepcopy(each) for each in VARIANTS["base"] if is_workload(each, "decode"))
    at = one["spec"]
    for key in path[:-1]:
        at = at[key]
    for wrong in ({"no": "such"}, [1]):
        at[path[-1]] = wrong
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(one, VERSIONS[-1])
    del at[path[-1]]
    at["noSuchField"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="noSuchField"):
        validate(one, VERSIONS[-1])


def is_workload(one: dict, component: str) -> bool:
    return any(each["metadata"]["labels"][COMPONENT] == component for each in templates(one))


def test_every_file_is_part_of_something():
    (base,) = read(DEPLOY / "base/kustomization.yaml")
    files = {path.name for path in (DEPLOY / "base").glob("*.yaml")}
    assert files == {*base["resources"], "kustomization.yaml"}
    assert {path.parent.name for path in DEPLOY.glob("*/*.yaml")} == {
        *("base", "keys", "spare", "tpu", "multihost")
    }


def test_names_are_unique_and_without_a_namespace():
    for objects in VARIANTS.values():
        names = [(one["kind"], one["metadata"]["name"]) for one in objects]
        assert len(names) == len(set(names))
        assert not any("namespace" in one["metadata"] for one in objects)


@pytest.mark.parametrize(
    ("variant", "component", "surge", "unavailable"),
    [
        ("base", "router", 1, 0),
        ("base", "prefill", 0, 1),
        ("base", "decode", 0, 1),
        ("spare", "prefill", 1, 0),
        ("spare", "decode", 1, 0),
    ],
)
def test_a_rolling_restart_takes_one_after_another(variant, component, surge, unavailable):
    (one,) = (each for each in VARIANTS[variant] if is_workload(each, component))
    how = {"maxSurge": surge, "maxUnavailable": unavailable}
    assert one["spec"]["strategy"]["rollingUpdate"] == how
    assert one["spec"]["minReadySeconds"] >= 5, "the next waits until this one has served a while"


@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_routers_find_workers_that_are_not_ready(component):
    """They are ready only when a router has linked."""
    name = f"kairos-{component}"
    (service,) = (
        each
        for each in VARIANTS["base"]
        if each["kind"] == "Service" and each["metadata"]["name"] == name
    )
    assert service["spec"]["publishNotReadyAddresses"]


def test_a_mesh_has_a_service_of_its_own():
    """The controller takes a Service of its name for its own, where pods look up their leader."""
    services = {each["metadata"]["name"] for each in VARIANTS["base"] if each["kind"] == "Service"}
    for path in MULTIHOST:
        (one,) = VARIANTS[path.stem]
        assert one["metadata"]["name"] not in services


@pytest.mark.parametrize("multihost", [None, *(path.stem for path in MULTIHOST)])
def test_selectors_select_the_pods_that_serve(multihost):
    """Services, budgets and policies find their pods, in the base and with a mesh in its place."""
    objects = VARIANTS["base"]
    if multihost:
        kept = [each for each in objects if each["kind"] != "Deployment"]
        others = [each for each in objects if is_workload(each, "router")]
        objects = [*kept, *others, *VARIANTS[multihost]]
    pods = [template for one in objects for template in templates(one)]
    found = 0
    for one in objects:
        selector = one.get("spec", {}).get("selector", {})
        labels = selector.get("matchLabels", selector)
        if one["kind"] not in ("Service", "PodDisruptionBudget"):
            continue
        if multihost and one["metadata"]["name"] == "kairos-prefill":
            continue
        (pod,) = (each for each in pods if labels.items() <= each["metadata"]["labels"].items())
        (container,) = pod["spec"]["containers"]
        assert "readinessProbe" in container
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in one["spec"].get("ports", ()):
            assert port["port"] == ports[port["name"]]
        found += 1
    assert found >= 4


@pytest.mark.parametrize("template", ALL)
def test_every_worker_is_behind_a_policy(template):
    (workers, router) = (one for one in VARIANTS["base"] if one["kind"] == "NetworkPolicy")
    component = template["metadata"]["labels"][COMPONENT]
    (expression,) = workers["spec"]["podSelector"]["matchExpressions"]
    (peers,) = workers["spec"]["ingress"][0]["from"]
    assert peers["podSelector"] == workers["spec"]["podSelector"]
    assert (component in expression["values"]) is (component != "router")
    assert router["spec"]["podSelector"]["matchLabels"][COMPONENT] == "router"


def flags_of(template: dict) -> dict[str, str]:
    (container,) = template["spec"]["containers"]
    return dict(flag.partition("=")[::2] for flag in container["args"])


@pytest.mark.parametrize("template", ALL)
def test_flags_agree_with_the_rest_of_the_pod(template):
    spec, given = template["spec"], flags_of(template)
    (container,) = spec["containers"]
    ports = {port["containerPort"] for port in container.get("ports", ())}
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert spec["terminationGracePeriodSeconds"] > sleep + float(given["--grace_s"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}
    secrets = [value for value in given.values() if value.startswith("/")]
    assert len(secrets) == 4 + ("--api_keys_file" in given)
    assert all(str(Path(path).parent) in mounts for path in secrets)
    if "follower" in template["metadata"]["labels"][COMPONENT]:
        assert not ports
        assert not any(key.endswith("Probe") for key in container)
        return
    own = ("--port", "--health_port", "--http_port", "--metrics_port")
    assert {int(given[flag]) for flag in own if flag in given} <= ports
    probes = {key: container[key]["grpc"] for key in container if key.endswith("Probe")}
    assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {probe["port"] for probe in probes.values()} == {int(given["--health_port"])}


@pytest.mark.parametrize("template", ALL)
def test_prometheus_finds_who_serves_and_may_ask(template):
    (workers, router) = (one for one in VARIANTS["base"] if one["kind"] == "NetworkPolicy")
    given, metadata = flags_of(template), template["metadata"]
    component = metadata["labels"][COMPONENT]
    if "follower" in component:
        assert "annotations" not in metadata
        return
    policy, flag = (router, "--http_port") if component == "router" else (workers, "--metrics_port")
    annotated = {"prometheus.io/scrape": "true", "prometheus.io/port": given[flag]}
    assert metadata["annotations"] == annotated
    to_all = [
        port["port"]
        for rule in policy["spec"]["ingress"]
        if rule.get("from") in (None, [{"namespaceSelector": {}}])
        for port in rule["ports"]
    ]
    assert int(given[flag]) in to_all
    assert (int(given["--port"]) in to_all) is (component == "router")


@pytest.mark.parametrize("variant", ["base", "keys", "tpu"])
def test_http_clients_need_a_key_where_it_says_so(variant):
    (router,) = (one for one in VARIANTS[variant] if is_workload(one, "router"))
    (template,) = templates(router)
    assert ("--api_keys_file" in flags_of(template)) is (variant == "keys")


@pytest.mark.parametrize("template", ALL)
def test_a_router_looks_where_workers_are(template):
    given = flags_of(template)
    if template["metadata"]["labels"][COMPONENT] != "router":
        assert "--prefill" not in given
        return
    services = {
        f"dns:{one['metadata']['name']}:{port['port']}"
        for one in VARIANTS["base"]
        if one["kind"] == "Service" and one["spec"].get("clusterIP") == "None"
        for port in one["spec"]["ports"]
    }
    assert {given["--prefill"], given["--decode"]} == services


def test_a_mesh_has_as_many_devices_as_its_hosts_have():
    for path in MULTIHOST:
        (one,) = VARIANTS[path.stem]
        size = one["spec"]["leaderWorkerTemplate"]["size"]
        for template in templates(one):
            (container,) = template["spec"]["containers"]
            (each,) = (n for name, n in container["resources"]["limits"].items() if "/" in name)
            assert int(flags_of(template)["--config.decode.devices"]) == size * int(each)


def commands() -> dict[str, list[str]]:
    """The flags of each binary, of all pods that run it, with values for the variables."""
    (settings,) = (one for one in VARIANTS["base"] if one["kind"] == "ConfigMap")
    values = settings["data"] | {
        "POD_IP": "10.0.0.7",
        "NAMESPACE": "default",
        "LWS_LEADER_ADDRESS": "kairos-decode-mesh-0.kairos-decode-mesh",
        "LWS_GROUP_SIZE": "2",
        "LWS_WORKER_INDEX": "1",
    }
    found: dict[str, list[str]] = {}
    for template in (each for param in ALL for each in param.values):
        (container,) = template["spec"]["containers"]
        python, _, module = container["command"]
        assert python == "python"
        args = [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], arg) for arg in container["args"]]
        found.setdefault(module, []).extend(args)
    return {module: list(dict.fromkeys(args)) for module, args in found.items()}


def check(module: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, "--only_check_args", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("module", "args"), commands().items())
@pytest.mark.slow
def test_the_binaries_have_these_flags(module, args):
    done = check(module, *args)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_binaries_would_say_so():
    done = check("kairos_jax.router", "--no_such_flag")
    assert done.returncode == 2
    assert "no_such_flag" in done.stderr


def test_the_image_has_what_it_runs():
    copied = set(re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M))
    sources = {source for line in copied for source in line.split()}
    assert {"kairos_jax", "models", "schedulers", "configs"} <= sources
    assert all((ROOT / source).exists() for source in sources)

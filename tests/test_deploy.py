"""What the deploy folder, the README and the pages tell people to type exists: commands, flags, files, images."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from was_search.service.cli.main import app
from was_search.service.reports.metrics import StudyMetrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PAGES = ("search", "runtime", "time-budgets", "rounded-weights", "control", "cluster", "how-good", "how-fast")
TEXTS = [
    DEPLOY / "README.md",
    DEPLOY / "runbook.md",
    DEPLOY / "compose.yaml",
    DEPLOY / "cluster.yaml",
    *MANIFESTS,
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in PAGES),
]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMAGE = f"{PROJECT['name']}:{PROJECT['version']}"

_SPAN = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def compose() -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def typed_lines(path: Path) -> Iterator[str]:
    """Lines and phrases of ``path`` that are meant to be typed, without comments; continued lines are joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield from (line.strip(" #") for line in text.splitlines() if line.lstrip().startswith("#"))
        return
    for block in _FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from _SPAN.findall(_FENCE.sub("", text))


def commands_in(path: Path) -> Iterator[list[str]]:
    """The arguments of every call of was-search in ``path``."""
    for line in typed_lines(path):
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
        for i, word in enumerate(words):
            starts = i == 0 or words[i - 1] not in ("cd", "secret")
            if word.rsplit("/", 1)[-1] == PROJECT["name"] and starts:
                end = next((j for j in range(i + 1, len(words)) if words[j] in ("|", "&&", ";", ">")), len(words))
                yield words[i + 1 : end]


def named_commands() -> list[tuple[str, list[str]]]:
    found = [(path.relative_to(ROOT).as_posix(), words) for path in TEXTS for words in commands_in(path)]
    for name, service in compose()["services"].items():
        command = service.get("command", [])
        if command[:1] == [PROJECT["name"]]:
            found.append((f"service {name}", command[1:]))
    for name, words in manifest_commands():
        found.append((name, words))
    return [(where, words) for where, words in found if words]


def manifests() -> list[dict[str, Any]]:
    return [part for path in MANIFESTS for part in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's specification in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for item in value.values():
            yield from pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from pods(item)


def manifest_commands() -> Iterator[tuple[str, list[str]]]:
    """The arguments of was-search in jobs and containers."""
    for document in manifests():
        name = f"{document['kind']} {document['metadata']['name']}"
        lines = [shlex.split(document["spec"]["entrypoint"])] if document["kind"] == "RayJob" else []
        lines += [
            container["command"] for pod in pods(document) for container in pod["containers"] if "command" in container
        ]
        for words in lines:
            assert words[0] == PROJECT["name"], f"{name} starts {words[0]}"
            yield name, words[1:]


def command_of(words: list[str]) -> Any:
    """The command that ``words`` call; a group's is named by two of them."""
    command = COMMANDS[words[0]]
    return command.commands[words[1]] if hasattr(command, "commands") else command


def flags_of(*words: str) -> set[str]:
    command = command_of([*words])
    parameters = command.params
    return {"-h", "--help"} | {flag for p in parameters for flag in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize(
    ("where", "words"), [pytest.param(w, c, id=f"{w}: {' '.join(c)[:60]}") for w, c in named_commands()]
)
def test_named_command_exists(where: str, words: list[str]) -> None:
    if words[0] == "submit" and "--" in words:
        test_named_command_exists(where, words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    flags = [word.split("=", 1)[0] for word in words if word.startswith("-")]
    if words[0].startswith("-"):
        assert words[0] in ("--version", "--help", "-h"), f"{where}: was-search has no option {words[0]}"
        return
    assert words[0] in COMMANDS, f"{where}: was-search has no command {words[0]}"
    unknown = sorted(set(flags) - flags_of(*words[:2]))
    assert not unknown, f"{where}: was-search {words[0]} has no {', '.join(unknown)}"


def test_the_texts_name_the_main_commands() -> None:
    """Guards the extraction: an empty list of commands would pass everything."""
    named = {words[0] for where, words in named_commands() if where.startswith("deploy/")}
    assert {"run", "doctor", "dashboard", "status"} <= named


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_flags_named_alone_exist(path: Path) -> None:
    """A flag that stands by itself in the text belongs to was-search, Ray or compose."""
    single = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]
    ours = set().union(*(flags_of(name) for name in single)) | {"--version"}
    others = {"--env-file", "--num-gpus", "--num-cpus", "--node-ip-address", "--dashboard-host", "--volumes"}
    others |= {"--createrole"}
    alone = {line.split()[0] for line in typed_lines(path) if line.startswith("--")}
    assert alone <= ours | others


def test_no_password_on_a_command_line() -> None:
    for where, words in named_commands():
        assert not any(re.search(r"://[^/@\s]+:[^@\s]+@", word) for word in words), where


def anchors(page: Path) -> set[str]:
    """What links can name on ``page``: its headings."""
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in _FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
        if line.startswith("#")
    }


def test_links_and_paths_exist() -> None:
    for path in [*DEPLOY.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), f"{path.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{path.name} links to {target}"
        if path not in TEXTS:
            continue  # the log and the decisions also name what is gone
        for named in re.findall(r"`((?:deploy|tests|docs|benchmarks|scripts|was_search)/[\w./-]+)`", text):
            assert (ROOT / named).exists(), f"{path.name} names {named}"


def test_compose_services_and_volumes_fit_together() -> None:
    document = compose()
    services = document["services"]
    ours = {"ray-head", "worker", "worker-gpu", "dashboard"}
    assert set(services) == {"postgres", "prometheus", "grafana"} | ours
    for name, service in services.items():
        for needed in service.get("depends_on", {}):
            assert "healthcheck" in services[needed], f"{name} waits for {needed}, which tells nothing of its health"
        for volume in service.get("volumes", []):
            source = volume.split(":", 1)[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_file(), f"{name} mounts {source}"
            else:
                assert source.startswith("$") or source in document["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("${WAS_LISTEN:-127.0.0.1}:"), f"{name} opens {port} to the network"


def test_gpu_reservation_is_a_profile() -> None:
    services = compose()["services"]
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert services["worker"]["profiles"] == ["cpu"]
    assert all("profiles" not in services[name] for name in ("postgres", "ray-head", "dashboard"))


def test_only_coordinator_and_dashboard_know_the_database() -> None:
    services = compose()["services"]
    knowing = {name for name, s in services.items() if "WAS_SEARCH_STORAGE" in s.get("environment", {})}
    assert knowing == {"ray-head", "dashboard"}
    with_token = {name for name, s in services.items() if s.get("environment", {}).get("RAY_AUTH_MODE") == "token"}
    assert with_token == {"ray-head", "worker", "worker-gpu"}


def test_images_are_the_same_everywhere() -> None:
    services = compose()["services"]
    others = ("postgres", "prometheus", "grafana")
    assert {s["image"] for name, s in services.items() if name not in others} == {IMAGE}
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert all(f"`{services[name]['image']}`" in readme for name in others)
    assert int(services["postgres"]["image"].removeprefix("postgres:")) >= 16
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            named = set(re.findall(r"\bwas-search:[\w.]+", path.read_text(encoding="utf-8")))
            assert named <= {IMAGE}, path.name
            postgres = set(re.findall(r"\bpostgres:\d+\b(?!/)", path.read_text(encoding="utf-8"))) - {"postgres:5432"}
            assert postgres <= {services["postgres"]["image"]}, path.name


def test_build_uses_what_is_there() -> None:
    for service in compose()["services"].values():
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [s for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for s in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == set(copied)
    extras = re.findall(r"'\.\[([\w,]+)\]'", dockerfile)[0].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    python = re.findall(r"^FROM python:(\d+\.\d+)-slim$", dockerfile, re.MULTILINE)[0]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_image_runs_without_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1:] == ["was"]
    home = {volume.split(":")[1] for s in compose()["services"].values() for volume in s.get("volumes", [])}
    made = " ".join(line for line in lines if "mkdir" in line)
    assert all(folder in made for folder in home if folder.startswith("/home/was/")), "a volume would belong to root"


def test_example_environment_is_complete_and_holds_no_secret() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\$\{(\w+)", text))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    lines = (DEPLOY / ".env.example").read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(given) == wanted
    assert required == {"POSTGRES_PASSWORD", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD"}
    assert all(not given[name] for name in (*required, "HF_TOKEN"))
    assert ".env" in (DEPLOY / ".gitignore").read_text(encoding="utf-8").split()


def test_kubernetes_containers_use_our_image_and_only_secrets_that_are_explained() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    found = [container for document in manifests() for pod in pods(document) for container in pod["containers"]]
    assert {container["image"] for container in found} == {IMAGE}
    made = set(re.findall(r"kubectl create secret generic ([\w-]+)", text))
    named = set()
    for container in found:
        named |= {e["valueFrom"]["secretKeyRef"]["name"] for e in container.get("env", []) if "valueFrom" in e}
        named |= {source["secretRef"]["name"] for source in container.get("envFrom", [])}
        assert all("value" not in e for e in container.get("env", [])), "a value in the open"
    assert named == made


def test_kubernetes_volumes_exist_and_are_explained() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for document in manifests():
        for pod in pods(document):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume:
                    assert f"`{volume['persistentVolumeClaim']['claimName']}`" in text


def test_the_head_is_not_preemptible_and_gpu_nodes_come_and_go() -> None:
    (cluster,) = (document for document in manifests() if document["kind"] == "RayCluster")
    (job,) = (document for document in manifests() if document["kind"] == "RayJob")
    spec = cluster["spec"]
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    capacity = "karpenter.sh/capacity-type"
    head, (group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["template"]["spec"]["nodeSelector"][capacity] == "on-demand"
    assert group["template"]["spec"]["nodeSelector"][capacity] == "spot"
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    # Ray's own account of GPUs and what Kubernetes gives the pod are the same.
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"]
    knowing = {e["name"] for c in head["template"]["spec"]["containers"] for e in c["env"]}
    assert "WAS_SEARCH_STORAGE" in knowing
    assert "env" not in worker


def test_the_ray_version_is_one_that_the_project_allows() -> None:
    (cluster,) = (document for document in manifests() if document["kind"] == "RayCluster")
    version = cluster["spec"]["rayVersion"]
    (wanted,) = (Requirement(line) for line in PROJECT["dependencies"] if line.startswith("ray"))
    assert version in wanted.specifier


def test_the_launchers_file_fits_rays_schema() -> None:
    from ray.autoscaler._private.util import validate_config

    document = yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8"))
    validate_config({**document, "cluster_synced_files": []})  # the launcher adds that one itself
    types = document["available_node_types"]
    assert "InstanceMarketOptions" not in types[document["head_node_type"]]["node_config"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert document["docker"]["image"] == IMAGE


def test_the_board_shows_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana" / "was-search.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"\bwas_search_\w+", text)}
    ours = {f"was_search_{end}" for end in ("slots", "best_loss_nats", "tokens_saved_ratio", "evaluations_total")}
    ours.add("was_search_workers")
    ours |= {"was_search_tokens_total", "was_search_evaluation_seconds_bucket"}
    assert named == ours
    samples = {sample.name for family in StudyMetrics("s").registry.collect() for sample in family.samples}
    known = {family.name for family in StudyMetrics("s").registry.collect()}
    for name in named:
        assert name in samples or re.sub(r"_(total|bucket)$", "", name) in known
    datasource = yaml.safe_load((DEPLOY / "grafana" / "datasource.yml").read_text(encoding="utf-8"))["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {datasource["uid"]}


def test_prometheus_looks_where_the_figures_are() -> None:
    services = compose()["services"]
    scrapes = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (target,) = scrapes[0]["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in services
    assert f"--metrics 0.0.0.0:{port}" in (DEPLOY / "README.md").read_text(encoding="utf-8")
    nodes = scrapes[1]["dns_sd_configs"][0]
    for name in nodes["names"]:
        assert f"--metrics-export-port={nodes['port']}" in services[name]["command"]


def test_the_runbook_quotes_messages_that_exist() -> None:
    text = (DEPLOY / "runbook.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text[text.index("## When") : text.index("## Watch")], re.MULTILINE)
    quoted = [span for row in rows for span in _SPAN.findall(row)]
    assert len(quoted) > 6
    sources = [p for folder in ("was_search", "storage", "workers", "kernels") for p in (ROOT / folder).rglob("*.py")]
    # Messages are broken over lines between quotation marks, with values in braces.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    code = re.sub(r"\{[^{}]*\}", "", code)
    for message in quoted:
        for part in re.split(r"\.\.\.|\d+", message):
            assert part.strip() in code, f"the runbook quotes {message!r}"

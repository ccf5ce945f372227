"""examples/deploy: what is started there is started with options that exist, and ends in time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.env import TABLE
from sgl_diffusion.cli import serve
from sgl_diffusion.cli.args import load_file, read, resolve
from sgl_diffusion.server.auth import PUBLIC_PATHS
from sgl_diffusion.server.settings import hosts_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"


def options(words: list[str]) -> ServeOptions:
    """Of a command line of `sglang`, as the command reads it."""
    assert words[0] == "serve", words
    return read(ServeOptions, serve.parser(), words[1:]).value


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture
def compose() -> dict[str, Any]:
    return dict(documents("compose.yaml")[0])


@pytest.fixture
def pod() -> dict[str, Any]:
    found = [one for one in documents("kubernetes.yaml") if one["kind"] == "StatefulSet"]
    return dict(found[0]["spec"]["template"]["spec"])


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: the word and what follows it, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def last(word: str) -> str:
    return [rest for one, rest in instructions() if one == word][-1]


def test_the_image_starts_the_server_as_nobody() -> None:
    words = [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]
    assert words[0] == "sglang" and options(words[1:]).host == "0.0.0.0"
    assert last("USER") not in ("0", "root") and last("EXPOSE") == str(ServeOptions().port)
    names = re.findall(r"(\w+)=", last("ENV"))
    assert {name for name in names if name.startswith("SGLD")} <= set(TABLE)


def test_the_image_is_built_of_what_is_there() -> None:
    kept = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
            if line.startswith("!")]  # fmt: skip
    copied = []
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            copied += rest.split()[:-1]
    assert sorted(copied) == sorted(kept) and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [rest for word, rest in instructions() if word == "RUN" and "/src[" in rest]
    (extras,) = re.findall(r"/src\[([\w,]+)\]", installs[0])
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert any(f"ARG TORCH={one.partition('==')[2]}" in (DEPLOY / "Dockerfile").read_text()
               for one in needed if one.startswith("torch"))  # fmt: skip


def test_the_health_check_follows_readyz() -> None:
    health = last("HEALTHCHECK")
    command = json.loads(health[health.index("CMD") + 3 :])
    assert command[0] == "python" and "/readyz" in PUBLIC_PATHS

    class Handler(BaseHTTPRequestHandler):
        status = 503

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        code = command[2].replace(str(ServeOptions().port), str(server.server_port))
        for status, healthy in ((503, False), (200, True)):
            Handler.status = status
            done = subprocess.run([sys.executable, *command[1:2], code], capture_output=True)
            assert (done.returncode == 0) == healthy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_compose(compose: dict[str, Any]) -> None:
    server = compose["services"]["server"]
    started = options(server["command"])
    assert int(server["stop_grace_period"].removesuffix("s")) >= started.drain_timeout + 15
    assert started.api_key_file == f"/run/secrets/{server['secrets'][0]}"
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    published = [
        port for service in compose["services"].values() for port in service.get("ports", [])
    ]
    assert published and all(port.startswith("127.0.0.1:") for port in published)
    volumes = {
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
    }
    for volume in volumes:
        assert (
            (DEPLOY / volume).exists() if volume.startswith(".") else volume in compose["volumes"]
        )


def test_prometheus_finds_the_server_and_grafana_finds_prometheus(
    compose: dict[str, Any],
) -> None:
    (scrape,) = documents("prometheus.yml")[0]["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name = target.split(":")[0]
    assert name in compose["services"]
    started = options(compose["services"]["server"]["command"])
    assert name in hosts_of(started, started.host, None), "or it is answered with 403"
    assert int(target.split(":")[1]) == ServeOptions().port
    secret = Path(scrape["authorization"]["credentials_file"]).name
    assert secret in compose["services"]["prometheus"]["secrets"] and secret in compose["secrets"]
    (source,) = documents("grafana-provisioning.yaml")[0]["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose["services"]
    (provider,) = documents("grafana-dashboards.yaml")[0]["providers"]
    mounts = compose["services"]["grafana"]["volumes"]
    assert any(f":{provider['options']['path']}/" in mount for mount in mounts)
    assert json.loads((ROOT / "docs" / "grafana.json").read_text())["panels"]


def test_kubernetes(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    started = options(container["args"])
    port = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert port == {"http": started.port}
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + started.drain_timeout + 15
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in
              ("startup", "readiness", "liveness")}  # fmt: skip
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(probes.values()) <= PUBLIC_PATHS
    assert pod["securityContext"]["runAsNonRoot"]
    assert str(pod["securityContext"]["runAsUser"]) == last("USER")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(json.loads(last("VOLUME"))) <= mounts
    assert str(Path(started.api_key_file or "").parent) in mounts
    (service,) = [one for one in documents("kubernetes.yaml") if one["kind"] == "Service"]
    assert service["spec"]["ports"][0]["targetPort"] in port
    assert service["metadata"]["name"] in hosts_of(started, started.host, None)


def unit() -> dict[str, str]:
    text = (DEPLOY / "sgl-diffusion.service").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def test_systemd() -> None:
    command = shlex.split(unit()["ExecStart"])
    assert command[0].endswith("/bin/sglang")
    words = [word for word in command[1:] if word != "/etc/sgl_diffusion/server.yaml"]
    words.remove("--config")
    started = options(words)
    assert started.api_key_file == "%d/" + unit()["LoadCredential"].partition(":")[0]
    from_file = resolve(ServeOptions, [("file", load_file(DEPLOY / "server.yaml"))]).value
    assert int(unit()["TimeoutStopSec"]) >= from_file.drain_timeout + 15
    assert set(re.findall(r"(SGLD_\w+)=", unit()["Environment"])) <= set(TABLE)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = Path(sys.executable).parent / "sglang"
    if not program.exists():
        pytest.skip("the package is not installed beside this Python")
    text = (DEPLOY / "sgl-diffusion.service").read_text()
    copy = tmp_path / "sgl-diffusion.service"
    copy.write_text(text.replace("/opt/sgl_diffusion/bin/sglang", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=100
    )
    told = [line for line in done.stderr.splitlines() if "sgl-diffusion" in line]
    assert not told, told

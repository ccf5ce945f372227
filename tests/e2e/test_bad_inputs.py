"""Every row of data/bad_inputs.yaml against a real server over a real socket.

After each row: an error in our envelope with a request id, no new file outside the data folder, no
job, the same worker, the memory of before, and a server that does the next good request (after
every eighth row a picture).
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.corpus import Group, load
from tests.e2e.server import Server

KEY, ADMIN = "user-0123456789abcdef", "admin-0123456789abcdef"
BEARER = {"authorization": f"Bearer {KEY}"}
SMALL = {"size": "64x64", "num_inference_steps": "1", "response_format": "b64_json"}
ROWS = load(Path(__file__).with_name("data") / "bad_inputs.yaml")
MEMORY = 50 * 2**20


class Victim:
    """A server in folders of its own, and what must not change about it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        places = {name: root / name for name in ("cwd", "home", "tmp")}
        for place in places.values():
            place.mkdir()
        self.server = Server(
            root / "data",
            env={
                "SGLD_API_KEY": KEY,
                "SGLD_ADMIN_KEY": ADMIN,
                "HOME": str(places["home"]),
                "TMPDIR": str(places["tmp"]),
                "OMP_NUM_THREADS": "1",
            },
            cwd=places["cwd"],
        )
        self.server.http.headers.update(BEARER)
        self.server.wait_ready()
        for _ in range(3):
            self.good()
        self.workers = self.server.workers()
        self.rows = 0
        self.files = self.outside()
        self.memory = self.resident()

    def outside(self) -> set[Path]:
        """Files of the server that are not in its data folder."""
        folders = [self.root / name for name in ("cwd", "home", "tmp")]
        return {path for folder in folders for path in folder.rglob("*")}

    def resident(self) -> int:
        pages = Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def good(self) -> None:
        body = {"prompt": "x", **SMALL, "num_inference_steps": 1}
        answer = self.server.http.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text

    def unharmed(self) -> None:
        self.rows += 1
        if self.rows % 8:
            assert self.server.http.get("/v1/videos").json()["data"] == []
        else:
            self.good()
        assert self.server.workers() == self.workers
        assert self.outside() == self.files
        assert self.resident() < self.memory + MEMORY

    def send(self, method: str, path: str, headers: dict[str, Any], body: bytes) -> httpx.Response:
        """By hand: clients repair what is wrong with paths and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            own = {"host": "127.0.0.1", **BEARER, "content-length": str(len(body))}
            for name, value in (own | headers).items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders()
            try:
                connection.send(body)
            except OSError:
                pass  # the answer came before the end of the body
            answer = connection.getresponse()
            return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
        finally:
            connection.close()

    def form(self, path: str, fields: list[tuple[str, Any]]) -> httpx.Response:
        parts = [("prompt", (None, "a cat")), *fields]
        return self.server.http.post(path, files=parts)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    made = Victim(tmp_path_factory.mktemp("bad"))
    yield made
    made.server.close()


def check(victim: Victim, answer: httpx.Response, status: int, code: str, param: str) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    if code != "-":
        body = json.loads(answer.content)
        assert set(body) == {"error", "detail"}
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"] or "-") == (code, param), body
        assert body["detail"] == error["message"] and len(error["message"]) < 600
        assert "Traceback" not in answer.text and "site-packages" not in answer.text
    victim.unharmed()


def rows(group: Group) -> Any:
    found = ROWS[group]
    return pytest.mark.parametrize("row", found, ids=[row.name for row in found])


def test_the_corpus_is_large_enough():
    assert sum(map(len, ROWS.values())) >= 250 and all(len(found) > 8 for found in ROWS.values())


@rows("images")
def test_images(victim, row):
    body = {"prompt": "a cat", **row.given[0]}
    answer = victim.server.http.post("/v1/images/generations", json=body)
    check(victim, answer, row.status, row.code, row.param)


@rows("videos")
def test_videos(victim, row):
    body = {"prompt": "a cat", **row.given[0]}
    answer = victim.server.http.post("/v1/videos", json=body)
    check(victim, answer, row.status, row.code, row.param)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos"])
@rows("json")
def test_json(victim, row, path):
    headers = {"content-type": "application/json"}
    answer = victim.send("POST", path, headers, row.given[0])
    check(victim, answer, row.status, row.code, row.param)


@rows("bodies")
def test_bodies(victim, row):
    path, body, headers = row.given
    answer = victim.send("POST", path.decode(), headers, body)
    check(victim, answer, row.status, row.code, row.param)


@rows("forms")
def test_forms(victim, row):
    answer = victim.form("/v1/videos", row.given[0])
    check(victim, answer, row.status, row.code, row.param)


@rows("edits")
def test_edits(victim, row):
    small = [(name, (None, value)) for name, value in SMALL.items()]
    answer = victim.form("/v1/images/edits", [*small, *row.given[0]])
    check(victim, answer, row.status, row.code, row.param)


@rows("lora")
def test_lora(victim, row):
    verb, body = row.given
    admin = {"authorization": f"Bearer {ADMIN}"}
    answer = victim.server.http.post(f"/v1/{verb}", json=body, headers=admin)
    check(victim, answer, row.status, row.code, row.param)


@rows("fine")
def test_odd_pictures_that_are_fine(victim, row):
    small = [(name, (None, value)) for name, value in SMALL.items()]
    answer = victim.form("/v1/images/edits", [*small, ("image", row.given[0])])
    check(victim, answer, 200, "-", "-")
    assert answer.json()["data"][0]["b64_json"]


@rows("requests")
def test_requests(victim, row):
    method, _, path = row.given[0].decode().partition(" ")
    answer = victim.send(method, path, row.given[1], b"")
    check(victim, answer, row.status, row.code, row.param)
    if answer.status_code == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
    if answer.status_code == 405:
        assert answer.headers["allow"]


def test_control_characters_in_a_prompt_stay_in_one_line_of_the_log(victim):
    prompt = "a\x00b\x1b[31m\r\n2026-01-01 CRITICAL all lost"
    body = {"prompt": prompt, **SMALL, "num_inference_steps": 1}
    assert victim.server.http.post("/v1/images/generations", json=body).status_code == 200
    lines = victim.server.log.read_text().splitlines()
    assert not any(line.startswith("2026-01-01 CRITICAL") for line in lines)
    events = [json.loads(line) for line in lines if line.startswith("{")]
    logged = [event for event in events if event["event"] == "request" and event.get("prompt")]
    assert logged and logged[-1]["prompt"].startswith("sha256:")
    text = victim.server.log.read_text()
    assert "all lost" not in text and KEY not in text and "Traceback" not in text


def listeners(processes: set[int]) -> set[int]:
    """The TCP ports on which any of `processes` listens, as the kernel knows them."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue  # closed meanwhile
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def family(process: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    found, more = {process}, {process}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def test_the_only_listener_is_the_api_port(victim):
    everyone = family(victim.server.process.pid)
    assert set(victim.workers) and set(victim.workers) < everyone
    assert listeners(everyone) == {victim.server.port}

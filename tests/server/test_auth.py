"""Keys: nobody gets in without one, whatever the method, the path or the header."""

from __future__ import annotations

import re

import pytest

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.server import playground
from sgl_diffusion.server.app import ROUTERS
from sgl_diffusion.server.auth import ADMIN_PATHS, PUBLIC_PATHS
from sgl_diffusion.server.keys import Keys, read_keys
from sgl_diffusion.server.settings import settings_of

USER, OTHER, ADMIN = "user-0123456789abcdef", "other-0123456789abcdef", "admin-0123456789abcdef"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@pytest.fixture
def locked(make_api):
    return make_api(keys=Keys.of([USER, OTHER], [ADMIN]))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes() -> set[str]:
    paths = {route.path for router in ROUTERS for route in router.routes} | {"/openapi.json"}
    return {re.sub(r"\{[^}]*\}", "video_0123456789", path) for path in paths}


def test_every_route_and_method_wants_a_key(locked):
    for path in sorted(routes() | ADMIN_PATHS):
        for method in METHODS:
            answer = locked.request(method, path)
            if path in PUBLIC_PATHS | playground.PATHS and method in ("GET", "HEAD"):
                assert answer.status_code in (200, 405), path
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or answer.json()["error"]["code"] == "missing_api_key"


@pytest.mark.parametrize(
    "path",
    ["/invocations", "/v1//videos", "/V1/videos", "/v1/videos/..;/", "/%68ealth/x", "/health/",
     "/livez/../v1/videos", "/health//", "/docs", "/redoc"],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_paths_that_are_no_routes_want_one_too(locked, method, path):
    assert locked.request(method, path).status_code == 401


@pytest.mark.parametrize(
    "given",
    ["Bearer wrong-0123456789abcdef", f"Bearer {USER[:-1]}", f"Bearer {USER}x", "Bearer ", "Bearer",
     "", f"Basic {USER}", USER, f"Bearer {USER} {USER}", f"Bearer\t{USER}", "Bearer \xe9"],
)  # fmt: skip
def test_wrong_keys(locked, given):
    answer = locked.get("/v1/models", headers=[("authorization", given.encode("latin-1"))])
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
    assert USER not in answer.text


def test_right_keys(locked):
    for key in (USER, OTHER, ADMIN):
        assert locked.get("/v1/models", headers=bearer(key)).status_code == 200
    lower = {"authorization": f"bearer {USER}"}
    assert locked.get("/v1/models", headers=lower).status_code == 200


def test_two_headers_are_no_key(locked):
    headers = [("authorization", f"Bearer {USER}")] * 2
    assert locked.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_admin_calls(locked, path):
    answer = locked.post(path, json={}, headers=bearer(USER))
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "admin_key_required"
    assert answer.json()["error"]["type"] == "permission_error"
    assert locked.post(path, json={}, headers=bearer(ADMIN)).status_code not in (401, 403)


def test_without_keys_this_machine_may_do_everything(api):
    assert api.get("/v1/models", headers=bearer("any")).status_code == 200
    assert api.post("/v1/set_lora", json={}).status_code != 403


def test_an_open_port_has_no_admins(make_api):
    api = make_api(keys=Keys.of([], local=False))
    assert api.get("/v1/models").status_code == 200
    assert api.post("/v1/set_lora", json={}).status_code == 403
    api.close()
    api = make_api(keys=Keys.of([], [ADMIN], local=False))
    assert api.post("/v1/set_lora", json={}, headers=bearer(USER)).status_code == 403
    assert api.post("/v1/set_lora", json={}, headers=bearer(ADMIN)).status_code != 403


def test_metrics_are_public_only_where_configured(make_api, locked):
    assert locked.get("/metrics").status_code == 401
    locked.close()
    api = make_api(keys=Keys.of([USER]), public_metrics=True)
    assert api.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("route", "field"),
    [("/models", "model_path"), ("/model_info", "model_path"), ("/v1/model_info", "model_path"),
     ("/server_info", "model_path"), ("/stats", "model_path")],
)  # fmt: skip
def test_paths_of_this_machine_are_for_admins(locked, route, field):
    assert locked.get(route, headers=bearer(USER)).json()[field] == "tiny"
    assert locked.get(route, headers=bearer(ADMIN)).json()[field] == "/models/tiny-wan"
    roots = [
        locked.get("/v1/models", headers=bearer(key)).json()["data"][0]["root"]
        for key in (USER, ADMIN)
    ]
    assert roots == ["tiny", "/models/tiny-wan"]


def test_callers_have_ids_that_say_nothing(locked):
    keys = locked.context.settings.keys
    ids = {keys.caller(key.encode()).key_id for key in (USER, OTHER, ADMIN)}
    assert len(ids) == 3 and not any(part in USER for part in ids)
    assert not keys.caller(USER.encode()).admin and keys.caller(ADMIN.encode()).admin


def test_cors_is_off_until_configured(make_api):
    api = make_api()
    preflight = {
        "origin": "https://studio.test",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    refused = api.request("OPTIONS", "/v1/videos", headers=preflight)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    api.close()
    api = make_api(keys=Keys.of([USER]), cors_origins=frozenset({"https://studio.test"}))
    allowed = api.request("OPTIONS", "/v1/videos", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://studio.test"
    origin = {"origin": "https://studio.test"}
    assert api.get("/v1/models", headers=origin).status_code == 401
    assert api.get("/v1/models", headers=origin | bearer(USER)).status_code == 200
    evil = preflight | {"origin": "https://evil.test"}
    assert api.request("OPTIONS", "/v1/videos", headers=evil).status_code == 403


def test_numeric_hosts_pass_where_all_interfaces_are_served(make_api):
    host = {"host": "192.168.1.5:30000"}
    api = make_api()
    assert api.get("/livez", headers=host).status_code == 403
    api.close()
    api = make_api(any_address=True)
    assert api.get("/livez", headers=host).status_code == 200
    assert api.get("/livez", headers={"host": "evil.test"}).status_code == 403


def test_key_files(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{USER}\n\n  {OTHER}  \n")
    path.chmod(0o600)
    assert read_keys(str(path), "", "api_key_file") == [USER, OTHER]
    assert read_keys(str(path), ADMIN, "api_key_file") == [ADMIN, USER, OTHER]
    assert read_keys(None, "", "api_key_file") == []


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "short\n", "with spaces 0123456789abcdef\n", "ümläut-0123456789ab\n"],
)
def test_bad_key_files(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(str(path), "", "api_key_file")
    assert "0123456789ab" not in str(caught.value)
    with pytest.raises(ConfigError, match="Cannot read"):
        read_keys(str(tmp_path / "missing"), "", "api_key_file")


def test_a_warning_for_a_shared_key_file(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(USER)
    path.chmod(0o644)
    read_keys(str(path), "", "api_key_file")
    assert "chmod 600" in caplog.text


def test_settings_from_options(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLD_API_KEY", USER)
    options = ServeOptions(
        data_dir=str(tmp_path),
        host="0.0.0.0",
        allowed_hosts="Gpu.lan, other",
        public_base_url="https://images.test/x",
        allow_media_host="CDN.lan:8080",
        allowed_media_path=str(tmp_path),
        max_image_mb=3,
        max_json_depth=7,
    )
    settings = settings_of(options)
    assert settings.keys.required and settings.any_address
    assert {"gpu.lan", "other", "images.test"} <= settings.allowed_hosts
    assert settings.fetch.hosts == {"cdn.lan:8080"}
    assert settings.inputs.image_bytes == 3 * 2**20 and settings.inputs.local_roots == (tmp_path,)
    assert settings.limits.max_json_depth == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"cors_origins": "*"},
        {"cors_origins": "https://a.test/"},
        {"allowed_media_path": "x"},
        {"database_url": "mysql://db/jobs"},
    ],
)
def test_wrong_settings(tmp_path, wrong):
    with pytest.raises(ConfigError):
        settings_of(ServeOptions(data_dir=str(tmp_path), **wrong))

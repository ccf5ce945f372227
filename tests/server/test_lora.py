"""The LoRA calls, and adapters in requests and in the list of models."""

from __future__ import annotations

import dataclasses

import pytest

from sgl_diffusion.base.errors import ConflictError, NotFoundError, UnavailableError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.server.keys import Keys
from tests.server.conftest import CARD

ADMIN, USER = "an-admin-key-that-is-long", "a-user-key-that-is-long"
FILE = {"weight_name": "pen.safetensors", "revision": "v1", "alpha": 2.5}
ADAPTER = {"nickname": "ink", "path": "me/ink", "rank": 4}


@pytest.fixture(autouse=True)
def takes_adapters(request):
    if "api" in request.fixturenames:
        request.getfixturevalue("api").client.model = dataclasses.replace(
            CARD, lora_targets=("transformer",)
        )


def test_the_documented_call_needs_no_content_type(api):
    body = '{"lora_nickname": "ink", "lora_path": "me/ink", "strength": 0.8}'
    answer = api.post(
        "/v1/set_lora", content=body, headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "message": "Successfully set LoRA adapter(s): ink (target: all, strength: 0.80)",
        "active": {},
    }
    setting = LoraSetting(nickname="ink", path="me/ink", strength=0.8, local=False)
    assert api.client.loras.calls == [("set", ((setting,), "auto"))]


def test_parts_that_the_model_does_not_take_are_in_the_answer(api):
    names = ["text_encoder.layer.0", "transformer.blocks.9.ffn"]
    api.client.loras.state["loaded_adapters"] = [
        {"nickname": "ink", "path": "me/ink", "unmatched": names},
        {"nickname": "older", "path": "me/older", "unmatched": ["transformer.other"]},
        {"nickname": "whole", "path": "me/whole", "unmatched": []},
    ]
    wanted = {"lora_nickname": ["ink", "whole"], "lora_path": ["me/ink", "me/whole"]}
    answer = api.post("/v1/set_lora", json=wanted)
    assert answer.status_code == 200 and answer.json()["unmatched"] == {"ink": names}


def test_lists_are_lined_up(api):
    answer = api.post(
        "/v1/set_lora",
        json={
            "lora_nickname": ["a", "b"],
            "lora_path": ["me/a", "me/b"],
            "target": ["all", "transformer"],
            "strength": [0.8, 1],
            "lora_alpha": [None, 2.5],
            "lora_weight_name": ["a.safetensors", None],
            "lora_revision": [None, "v1"],
            "merge_mode": "dynamic",
        },
    )
    assert answer.json()["message"] == (
        "Successfully set LoRA adapter(s): a, b (target: all, transformer, strength: 0.80, 1.00)"
    )
    ((_, (settings, mode)),) = api.client.loras.calls
    assert mode == "dynamic"
    assert [(s.alpha, s.weight_name, s.revision) for s in settings] == [
        (None, "a.safetensors", None),
        (2.5, None, "v1"),
    ]


def test_merge_and_unmerge_take_an_empty_body(api):
    assert api.post("/v1/unmerge_lora_weights").json()["message"] == (
        "Successfully unmerged LoRA weights (target: all)"
    )
    assert api.post("/v1/merge_lora_weights").status_code == 200
    one = {"target": ["transformer"], "strength": 0.5}
    assert api.post("/v1/merge_lora_weights", json=one).json()["message"] == (
        "Successfully merged LoRA weights (target: transformer, strength: 0.50)"
    )
    assert api.client.loras.calls == [
        ("unmerge", "all"),
        ("merge", ("all", 1.0)),
        ("merge", ("transformer", 0.5)),
    ]


@pytest.mark.parametrize(
    ("call", "body", "code", "param"),
    [
        ("set_lora", {}, "missing_parameter", "lora_nickname"),
        ("set_lora", {"lora_nickname": ["a", "b"], "lora_path": "x/y"}, "mismatched_lengths", None),
        ("set_lora", {"lora_nickname": "a", "target": "vae"}, "invalid_target", "target"),
        ("set_lora", {"lora_nickname": "a", "strength": 1e9}, "out_of_range", "strength"),
        ("set_lora", {"lora_nickname": "a", "strength": "1"}, "invalid_type", "strength"),
        ("set_lora", {"lora_nickname": "../x"}, "invalid_value", "lora_nickname"),
        ("set_lora", {"lora_nickname": "n" * 10_000}, "invalid_value", "lora_nickname"),
        ("set_lora", {"lora_nickname": ["a", "a"]}, "lora_twice", "lora_nickname"),
        ("set_lora", {"lora_nickname": "a", "merge_mode": "magic"}, "invalid_value", "merge_mode"),
        ("set_lora", {"lora_nickname": "a", "lora_pat": "x"}, "unknown_parameter", "lora_pat"),
        ("merge_lora_weights", {"target": "vae"}, "invalid_target", "target"),
        ("merge_lora_weights", {"strength": -1e9}, "out_of_range", "strength"),
        ("unmerge_lora_weights", {"target": ["all", "critic"]}, "invalid_type", "target"),
    ],
)
def test_what_cannot_be_meant(api, call, body, code, param):
    answer = api.post(f"/v1/{call}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert param is None or error["param"] == param
    assert api.client.loras.calls == []


def test_nan_is_no_strength(api):
    body = '{"lora_nickname": "a", "strength": NaN}'
    answer = api.post("/v1/set_lora", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_finite")


@pytest.mark.parametrize("header", [{"origin": "http://127.0.0.1:30000"}, {"sec-fetch-site": "x"}])
def test_a_web_page_has_to_say_json(api, header):
    body = '{"lora_nickname": "a", "lora_path": "me/a"}'
    for kind, status in (("text/plain", 415), ("application/json", 200)):
        headers = {**header, "content-type": kind}
        assert api.post("/v1/set_lora", content=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFoundError("x", code="lora_not_found"), 404),
        (ConflictError("x", code="lora_not_set"), 409),
        (UnavailableError("x", code="change_timeout"), 503),
    ],
)
def test_errors_of_the_engine_are_told(api, error, status):
    api.client.loras.fail_with = error
    answer = api.post("/v1/set_lora", json={"lora_nickname": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, error.code)


def test_list_and_delete(api):
    api.client.loras.state |= {"loaded_adapters": [ADAPTER], "waiting_jobs": 0}
    assert api.get("/v1/list_loras").json() == api.client.loras.state
    assert api.request("DELETE", "/v1/loras/ink").json() == {
        "nickname": "ink",
        "object": "lora.deleted",
        "deleted": True,
    }
    assert api.client.loras.calls[-1] == ("delete", "ink")


def test_adapters_are_models(api):
    api.client.loras.state["loaded_adapters"] = [ADAPTER]
    listed = api.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "tiny:ink"]
    assert listed[1]["parent"] == "tiny"
    assert api.get("/v1/models/tiny:ink").json() == listed[1]
    assert api.get("/v1/models/tiny:pen").status_code == 404
    assert api.get("/stats").json()["lora"] == {"state": "ready", "active": {}}


@pytest.mark.parametrize("route", ["images/generations", "videos"])
def test_a_request_names_its_adapters(api, route):
    body = {
        "prompt": "a fox",
        "model": "tiny:ink",
        "lora": [{"nickname": "pen", "strength": 0.5, "path": "me/pen", **FILE}],
    }
    answer = api.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    if route == "videos":
        api.wait_for(answer.json()["id"], "completed")
    assert api.client.submitted[0].loras == (
        LoraUse(nickname="ink"),
        LoraUse(nickname="pen", strength=0.5, path="me/pen", local=False, **FILE),
    )


def test_a_form_carries_adapters_as_json(api):
    files = {"prompt": (None, "waves"), "lora[]": (None, '{"nickname": "pen", "strength": 2}')}
    answer = api.post("/v1/videos", files=files)
    assert answer.status_code == 200, answer.text
    api.wait_for(answer.json()["id"], "completed")
    assert api.client.submitted[0].loras == (LoraUse(nickname="pen", strength=2),)
    assert api.client.loras.calls[0][0] == "prepare"
    files["lora[]"] = (None, "{")
    assert api.post("/v1/videos", files=files).json()["error"]["param"] == "lora"


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"nickname": "../x"}, "invalid_value"),
        ({"nickname": "a", "strength": 101}, "out_of_range"),
        ({"nickname": "a", "weight": 1}, "unknown_parameter"),
        ({"nickname": "a", "accepted": True}, "unknown_parameter"),
        ({"nickname": "a", "revision": "../x"}, "invalid_value"),
        ({"nickname": "a", "weight_name": ""}, "invalid_value"),
        ({"nickname": "a", "alpha": 0}, "out_of_range"),
        ({"strength": 1}, "missing_parameter"),
        ("a", "invalid_type"),
        ({"nickname": "ink"}, "lora_twice"),  # the one of the model name again
    ],
)
def test_wrong_adapters_in_a_request(api, entry, code):
    body = {"prompt": "a fox", "model": "tiny:ink", "lora": [entry]}
    answer = api.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["param"].partition(".")[0] == "lora"
    assert api.client.submitted == []


def test_a_video_whose_adapter_is_missing_is_refused_before_it_is_queued(api):
    api.client.loras.fail_with = NotFoundError("x", code="lora_not_found")
    answer = api.post("/v1/videos", json={"prompt": "waves", "lora": [{"nickname": "a"}]})
    assert answer.status_code == 404
    assert api.get("/v1/videos").json()["data"] == []


def test_a_model_without_adapters_says_so(api):
    api.client.model = CARD
    answer = api.post(
        "/v1/images/generations", json={"prompt": "a fox", "lora": [{"nickname": "a"}]}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "lora_not_supported")


def test_who_may_name_local_paths(make_api, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    keys = Keys.of([USER], [ADMIN], local=False)
    api = make_api(keys=keys, lora_roots=(folder,))
    api.client.model = dataclasses.replace(CARD, lora_targets=("transformer",))

    def ask(key: str, path: str) -> int:
        body = {"prompt": "a fox", "lora": [{"nickname": "a", "path": path}]}
        headers = {"authorization": f"Bearer {key}"}
        return api.post("/v1/images/generations", json=body, headers=headers).status_code

    assert ask(ADMIN, "/etc/passwd") == 200  # the engine refuses what is no adapter
    assert ask(USER, "/etc/passwd") == 400
    assert ask(USER, "../../x") == 400
    assert ask(USER, str(folder / "a.safetensors")) == 200
    assert ask(USER, str(folder / ".." / "a.safetensors")) == 400
    assert ask(USER, "me/ink") == 200
    user = {"authorization": f"Bearer {USER}"}
    body = {"lora_nickname": "a", "lora_path": "me/a"}
    for method, path in (
        ("POST", "/v1/set_lora"),
        ("POST", "/v1/merge_lora_weights"),
        ("POST", "/v1/unmerge_lora_weights"),
        ("DELETE", "/v1/loras/a"),
    ):
        answer = api.request(method, path, json=body, headers=user)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required")

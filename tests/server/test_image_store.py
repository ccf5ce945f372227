"""Kept images: list, retrieve, delete; after a restart, too."""

from __future__ import annotations

from typing import Any

import pytest


def make(api: Any, **more: Any) -> dict[str, Any]:
    answer = api.post("/v1/images/generations", json={"prompt": "a cat", **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_kept_image_is_known(api: Any) -> None:
    made = make(api, n=2, output_format="webp", seed=5)
    found = api.get(f"/v1/images/{made['id']}").json()
    assert abs(found.pop("expires_at") - made["created"] - 72 * 3600) <= 2
    assert found == {
        "id": made["id"],
        "object": "image",
        "status": "completed",
        "model": "tiny",
        "created_at": made["created"],
        "prompt": "a cat",
        "size": "64x48",
        "output_format": "webp",
        "seeds": [5, 6],
        "data": [{**entry, "b64_json": None} for entry in made["data"]],
    }


def test_only_images_with_a_url_are_kept(api: Any) -> None:
    made = make(api, response_format="b64_json")
    assert api.get(f"/v1/images/{made['id']}").status_code == 404
    assert api.get("/v1/images").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_pages(api: Any) -> None:
    made = [make(api, response_format="url")["id"] for _ in range(5)]
    seen: list[str] = []
    after, pages = "", 0
    while pages < 10:
        page = api.get(f"/v1/images?limit=2&order=asc{after}").json()
        seen += [entry["id"] for entry in page["data"]]
        pages += 1
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert seen == made and pages == 3
    assert [entry["id"] for entry in api.get("/v1/images").json()["data"]] == made[::-1]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "out_of_range"),
        ("limit=101", "out_of_range"),
        ("limit=abc", "out_of_range"),
        ("order=sideways", "invalid_value"),
        ("after=image_0123456789", "invalid_cursor"),
        ("after=../../x", "invalid_cursor"),
    ],
)
def test_wrong_queries(api: Any, query: str, code: str) -> None:
    answer = api.get(f"/v1/images?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_delete_removes_row_and_files(api: Any) -> None:
    made = make(api, n=2)
    path = f"/v1/images/{made['id']}"
    answer = api.request("DELETE", path)
    assert answer.json() == {"id": made["id"], "object": "image.deleted", "deleted": True}
    assert not list((api.folder / "images").iterdir())
    for method, url in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        assert api.request(method, url).json()["error"]["code"] == "image_not_found"


def test_images_survive_a_restart(make_api: Any) -> None:
    first = make_api()
    made = make(first)
    first.close()
    again = make_api()
    assert again.get(f"/v1/images/{made['id']}").status_code == 200
    assert again.get(made["data"][0]["url"]).status_code == 200
    assert not again.client.submitted, "an image is no job to take up"


def test_a_file_that_is_gone_is_not_found(api: Any) -> None:
    made = make(api)
    for path in (api.folder / "images").iterdir():
        path.unlink()
    answer = api.get(made["data"][0]["url"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "image_expired")


def test_what_cannot_be_stored_leaves_no_file(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_diffusion.base.errors import UnavailableError

    async def full(row: Any) -> None:
        raise UnavailableError("Full.", code="insufficient_storage")

    monkeypatch.setattr(api.jobs, "insert", full)
    answer = api.post("/v1/images/generations", json={"prompt": "x"})
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert not list((api.folder / "images").iterdir())


@pytest.mark.parametrize("name", ["generations", "edits"])
def test_names_of_routes_are_no_ids(api: Any, name: str) -> None:
    assert api.get(f"/v1/images/{name}").status_code == 405

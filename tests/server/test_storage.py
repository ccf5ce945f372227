"""Copies in a bucket, against a real S3 server process on loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import boto3
import httpx
import pytest
from botocore.config import Config

from sgl_diffusion.base.config import ServeOptions
from sgl_diffusion.base.errors import ConfigError, SetupError
from sgl_diffusion.server.storage import Bucket, S3Settings, s3_settings

PATH = "/v1/videos"
BUCKET = "results"
KEYS = {"access_key": "test-key", "secret_key": "test-secret"}


class S3Server:
    """moto's server in a process of its own, so that it can be stopped and killed."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(self.url, timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.05)
        self.client().create_bucket(Bucket=BUCKET)

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
            config=Config(connect_timeout=5, read_timeout=5),
        )

    def names(self) -> list[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return sorted(entry["Key"] for entry in found)

    def objects(self) -> dict[str, dict]:
        client = self.client()
        found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {entry["Key"]: client.get_object(Bucket=BUCKET, Key=entry["Key"]) for entry in found}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def process():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(process):
    if process.process.poll() is not None:
        process.start()
    for key in process.names():
        process.client().delete_object(Bucket=BUCKET, Key=key)
    return process


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("sgl_diffusion.server.uploads._FIRST_PAUSE", 0.05)
    monkeypatch.setattr("sgl_diffusion.server.uploads._LONGEST_PAUSE", 0.2)


def settings(s3, **more):
    return S3Settings(bucket=BUCKET, endpoint_url=s3.url, **KEYS, **more)


def finished(api, **body):
    video = api.post(PATH, json={"prompt": "x", "num_frames": 5, **body}).json()
    return api.wait_for(video["id"], "completed")


def uploaded(api, video):
    """The video when its address is no longer ours."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = api.get(f"{PATH}/{video['id']}").json()
        if now["url"].startswith("http"):
            return now
        time.sleep(0.02)
    raise AssertionError("it is not in the bucket")


def until(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


def test_a_video_is_copied_and_its_copies_deleted(s3, make_api):
    api = make_api(s3=settings(s3, prefix="some/where/"))
    video = uploaded(api, finished(api, n=2))
    objects = s3.objects()
    stem = f"some/where/{video['id']}"
    assert sorted(objects) == sorted(
        f"{stem}{number}{suffix}" for number in ("", "_1") for suffix in (".jpg", ".mp4", ".webp")
    )
    assert objects[f"{stem}.mp4"]["ContentType"] == "video/mp4"
    assert objects[f"{stem}.webp"]["ContentType"] == "image/webp"
    assert video["urls"] == [f"{s3.url}/{BUCKET}/{stem}{number}.mp4" for number in ("", "_1")]
    here = api.get(f"{PATH}/{video['id']}/content").content
    assert objects[f"{stem}.mp4"]["Body"].read() == here
    api.request("DELETE", f"{PATH}/{video['id']}")
    until(lambda: not s3.names())


def test_signed_urls(s3, make_api):
    api = make_api(s3=settings(s3, url_seconds=600))
    video = uploaded(api, finished(api))
    assert "X-Amz-Signature=" in video["url"] and "X-Amz-Expires=600" in video["url"]
    assert "test-secret" not in video["url"]
    here = api.get(f"{PATH}/{video['id']}/content").content
    assert httpx.get(video["url"]).content == here


def test_a_file_that_is_only_in_the_bucket(s3, make_api):
    api = make_api(s3=settings(s3))
    video = uploaded(api, finished(api))
    (api.folder / "videos" / f"{video['id']}.mp4").unlink()
    answer = api.get(f"{PATH}/{video['id']}/content")
    assert answer.status_code == 302
    address = answer.headers["location"]  # signed: the bucket may be private
    assert address.startswith(f"{video['url']}?") and "X-Amz-Signature=" in address
    assert httpx.get(address).content[4:8] == b"ftyp"


def test_images(s3, make_api):
    """The answer waits for the copy; without a bucket it has the address here."""
    api = make_api(s3=settings(s3))
    body = {"prompt": "x", "n": 2, "response_format": "url"}
    answer = api.post("/v1/images/generations", json=body).json()
    names = [f"{answer['id']}_{index}.png" for index in range(2)]
    assert [entry["url"] for entry in answer["data"]] == [
        f"{s3.url}/{BUCKET}/{name}" for name in names
    ]
    assert s3.names() == names
    (api.folder / "images" / names[1]).unlink()
    content = api.get(f"/v1/images/{answer['id']}/content?variant=1")
    assert content.status_code == 302
    assert httpx.get(content.headers["location"]).content.startswith(b"\x89PNG")
    api.request("DELETE", f"/v1/images/{answer['id']}")
    until(lambda: not s3.names())


def test_an_image_does_not_wait_for_ever(s3, make_api, monkeypatch):
    monkeypatch.setattr("sgl_diffusion.server.image_job._UPLOAD_SECONDS", 0.3)
    api = make_api(s3=settings(s3))
    s3.process.send_signal(signal.SIGSTOP)
    try:
        answer = api.post("/v1/images/generations", json={"prompt": "x"}).json()
        assert answer["data"][0]["url"] == f"/v1/images/{answer['id']}/content"
    finally:
        s3.process.send_signal(signal.SIGCONT)


def test_the_bucket_is_down(s3, make_api):
    """The job is completed and served from here; the copy is made when the bucket is back."""
    api = make_api(s3=settings(s3))
    s3.stop()
    video = finished(api)
    assert video["url"] == f"{PATH}/{video['id']}/content"
    assert api.get(video["url"]).status_code == 200
    failed = 'sgld_uploads_total{action="copy",outcome="failed"}'
    until(lambda: failed in api.get("/metrics").text)
    assert "sgld_uploads_waiting 1.0" in api.get("/metrics").text
    s3.start()
    assert uploaded(api, video)["status"] == "completed"
    assert "sgld_uploads_waiting 0.0" in api.get("/metrics").text


def test_a_slow_bucket_holds_nothing_up(s3, make_api):
    api = make_api(s3=settings(s3))
    s3.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(4):
            assert api.get(finished(api)["url"]).status_code == 200
        now = api.get("/metrics").text  # no copy was made meanwhile, and none was given up
        assert "sgld_uploads_waiting 4.0" in now and 'action="copy"' not in now
    finally:
        s3.process.send_signal(signal.SIGCONT)
    for video in api.get(PATH).json()["data"]:
        uploaded(api, video)


@pytest.mark.parametrize("wrong", ["bucket", "refused"])
def test_a_bucket_that_refuses(s3, make_api, wrong):
    other = {"bucket": "elsewhere"} if wrong == "bucket" else {"bucket": "a" * 80}
    api = make_api(s3=S3Settings(endpoint_url=s3.url, **KEYS, **other))
    video = finished(api)
    failed = 'sgld_uploads_total{action="copy",outcome="failed"}'
    until(lambda: failed in api.get("/metrics").text)
    assert api.get(f"{PATH}/{video['id']}").json()["status"] == "completed"
    assert api.get(video["url"]).status_code == 200


def test_a_new_server_makes_the_copies_that_are_missing(s3, make_api):
    first = make_api()
    videos = [finished(first, seed=seed) for seed in (1, 2)]
    first.close()
    second = make_api(s3=settings(s3))
    for video in videos:
        uploaded(second, video)
    assert len(s3.names()) == 6


def test_deleted_before_it_was_copied(s3, make_api):
    api = make_api(s3=settings(s3))
    s3.process.send_signal(signal.SIGSTOP)
    try:
        video = finished(api)
        api.request("DELETE", f"{PATH}/{video['id']}")
    finally:
        s3.process.send_signal(signal.SIGCONT)
    until(lambda: "sgld_uploads_waiting 0.0" in api.get("/metrics").text)
    until(lambda: not s3.names())


def test_copied_while_its_copies_are_deleted(s3, make_api, monkeypatch):
    """The bucket is searched before the copy arrives, and the search ends after it."""
    copying, searched, gone = threading.Event(), threading.Event(), threading.Event()
    put, drop = Bucket.put, Bucket.drop

    def late_put(bucket, path):
        copying.set()
        searched.wait(60)
        try:
            return put(bucket, path)
        except FileNotFoundError:
            gone.set()
            raise

    def long_drop(bucket, name):
        drop(bucket, name)
        if not searched.is_set():
            s3.client().put_object(
                Bucket=BUCKET, Key=f"{name}.mp4", Body=b"on its way all the time"
            )
            searched.set()
            gone.wait(60)
            time.sleep(0.2)

    monkeypatch.setattr(Bucket, "put", late_put)
    monkeypatch.setattr(Bucket, "drop", long_drop)
    api = make_api(s3=settings(s3))
    video = finished(api)
    assert copying.wait(60)
    api.request("DELETE", f"{PATH}/{video['id']}")
    assert searched.wait(60) and gone.wait(60)
    until(lambda: "sgld_uploads_waiting 0.0" in api.get("/metrics").text)
    until(lambda: not s3.names())


def test_a_new_server_deletes_the_copies_that_are_left(s3, make_api):
    first = make_api(s3=settings(s3))
    gone, kept = (uploaded(first, finished(first, seed=seed)) for seed in (1, 2))
    first.close()
    second = make_api()  # knows of no bucket
    second.request("DELETE", f"{PATH}/{gone['id']}")
    second.close()
    third = make_api(s3=settings(s3))
    until(lambda: len(s3.names()) == 3)
    assert all(name.startswith(kept["id"]) for name in s3.names())
    until(lambda: third.run(third.jobs.events(gone["id"]))[-1]["kind"] == "copies_deleted")
    assert third.run(third.jobs.gone("copies_deleted")) == []


VARIABLES = (
    "SGLD_S3_BUCKET SGLD_S3_ENDPOINT_URL SGLD_S3_REGION SGLD_S3_ACCESS_KEY_ID "
    "SGLD_S3_SECRET_ACCESS_KEY SGLANG_CLOUD_STORAGE_TYPE SGLANG_S3_BUCKET_NAME "
    "SGLANG_S3_ENDPOINT_URL SGLANG_S3_REGION_NAME SGLANG_S3_ACCESS_KEY_ID "
    "SGLANG_S3_SECRET_ACCESS_KEY"
).split()


@pytest.fixture
def variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_no_bucket_is_no_storage(variables):
    variables(SGLANG_S3_BUCKET_NAME="ignored without the type")
    assert s3_settings(ServeOptions()) is None


def test_settings_from_options_and_variables(variables):
    variables(
        SGLANG_CLOUD_STORAGE_TYPE="s3", SGLANG_S3_BUCKET_NAME="theirs", SGLANG_S3_REGION_NAME="eu",
        SGLANG_S3_ENDPOINT_URL="http://a", SGLANG_S3_ACCESS_KEY_ID="k",
        SGLANG_S3_SECRET_ACCESS_KEY="s",
    )  # fmt: skip
    peer = s3_settings(ServeOptions())
    assert peer is not None
    assert (peer.bucket, peer.region, peer.endpoint_url) == ("theirs", "eu", "http://a")
    assert (peer.access_key, peer.secret_key) == ("k", "s")
    assert "'s'" not in repr(peer) and "secret" not in repr(peer)
    variables(SGLD_S3_BUCKET="ours", SGLD_S3_REGION="us")
    ours = s3_settings(ServeOptions(s3_region="flag", s3_prefix="p/"))
    assert ours is not None
    assert (ours.bucket, ours.region, ours.prefix) == ("ours", "flag", "p/")


@pytest.mark.parametrize(
    "values",
    [
        {"SGLANG_CLOUD_STORAGE_TYPE": "gcs"},
        {"SGLANG_CLOUD_STORAGE_TYPE": "s3"},
        {"SGLD_S3_BUCKET": "b", "SGLD_S3_ACCESS_KEY_ID": "only one"},
    ],
)
def test_wrong_settings(variables, values):
    variables(**values)
    with pytest.raises(ConfigError):
        s3_settings(ServeOptions())


def test_a_wrong_endpoint_ends_the_start():
    with pytest.raises(SetupError, match="not the URL"):
        Bucket(S3Settings(bucket="b", endpoint_url="nowhere", **KEYS))


def test_without_boto3(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SetupError, match="boto3") as raised:
        Bucket(S3Settings(bucket="b"))
    assert "[s3]" in raised.value.hint

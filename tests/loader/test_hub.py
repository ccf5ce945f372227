"""Models by path and by hub id, against a hub on loopback."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_diffusion.base.errors import ModelNotFoundError, SetupError
from sgl_diffusion.loader.hub import check_sums, choose_files, resolve_model
from sgl_diffusion.recipes.catalog import NAMES
from tests.loader.tiny_hub import COMMIT, TinyHub, serving

WEIGHTS = bytes(range(256)) * 4096
CHUNK = 1 << 16  # what the library keeps of a broken download is a whole number of these
REPO = {
    "model_index.json": json.dumps({"_class_name": "WanPipeline"}).encode(),
    "README.md": b"not needed",
    "one-file-model.safetensors": WEIGHTS,
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model.fp16.safetensors": WEIGHTS[::2],
    "transformer/diffusion_pytorch_model.bin": WEIGHTS,
    "tokenizer/spiece.model": b"pieces",
}
NEEDED = {
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "tokenizer/spiece.model",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    repos = {
        "org/wan-tiny": REPO,
        "org/gated": REPO,
        "org/pickled": {"model_index.json": b"{}", "unet/pytorch_model.bin": b"0"},
        "org/empty": {"README.md": b"nothing"},
    }
    with serving(TinyHub(repos)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_hub_id_brings_only_what_is_needed(hub: TinyHub, cache: Path) -> None:
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    assert files(folder) == NEEDED
    assert (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == WEIGHTS


def test_the_second_time_no_file_moves(hub: TinyHub, cache: Path) -> None:
    first = resolve_model("org/wan-tiny", cache_dir=cache)
    hub.requests.clear()
    assert resolve_model("org/wan-tiny", cache_dir=cache) == first
    assert not any("/resolve/" in path for method, path, _ in hub.requests if method == "GET")


def test_a_broken_download_goes_on_where_it_broke(
    hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    name = "transformer/diffusion_pytorch_model.safetensors"
    hub.breaks[name] = 2
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    assert (folder / name).read_bytes() == WEIGHTS
    half, quarters = len(WEIGHTS) // 2, len(WEIGHTS) * 3 // 4
    assert hub.bytes_asked(name) == [None, f"bytes={half}-", f"bytes={quarters}-"]


def test_revisions(hub: TinyHub, cache: Path) -> None:
    assert resolve_model("org/wan-tiny", COMMIT, cache_dir=cache).name == COMMIT
    with pytest.raises(ModelNotFoundError, match="no revision v9"):
        resolve_model("org/wan-tiny", "v9", cache_dir=cache)


def test_a_variant_is_fetched_instead_of_the_plain_weights(hub: TinyHub, cache: Path) -> None:
    folder = resolve_model("org/wan-tiny", variant="fp16", cache_dir=cache)
    name = "transformer/diffusion_pytorch_model"
    assert files(folder) == NEEDED - {f"{name}.safetensors"} | {f"{name}.fp16.safetensors"}


def test_a_variant_that_is_not_there(
    hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match="no weights of the variant 'fp8'") as caught:
        resolve_model("org/wan-tiny", variant="fp8", cache_dir=cache)
    assert caught.value.hint == "It has fp16."
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    with pytest.raises(SetupError, match="variant 'fp16'"):
        resolve_model(str(folder), variant="fp16")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the cache has the plain weights only
    with pytest.raises(SetupError, match="variant 'fp16'"):
        resolve_model("org/wan-tiny", variant="fp16", cache_dir=cache)


def test_the_token_is_sent(hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    resolve_model("org/wan-tiny", cache_dir=cache)
    assert hub.tokens == {"hf_test"}


def test_a_gated_repository_says_what_to_do(hub: TinyHub, cache: Path) -> None:
    hub.gated.add("org/gated")
    with pytest.raises(ModelNotFoundError, match="gated") as caught:
        resolve_model("org/gated", cache_dir=cache)
    assert f"{hub.url}/org/gated" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint


def test_a_wrong_id_suggests_what_was_downloaded(hub: TinyHub, cache: Path) -> None:
    resolve_model("org/wan-tiny", cache_dir=cache)
    with pytest.raises(ModelNotFoundError, match="org/wan-tyny") as caught:
        resolve_model("org/wan-tyny", cache_dir=cache)
    assert caught.value.hint == "Did you mean 'org/wan-tiny'?"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("wan2.1-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo"),
        ("me/qwen-image", ""),
        ("a", ""),
    ],
)
def test_a_wrong_id_suggests_what_is_known(
    hub: TinyHub, cache: Path, wrong: str, meant: str
) -> None:
    if meant:
        hub.repos[meant] = REPO
    with pytest.raises(ModelNotFoundError, match=wrong) as caught:
        resolve_model(wrong, cache_dir=cache, known=NAMES)
    if not meant:
        assert "Check the spelling" in caught.value.hint
        return
    size = sum(len(REPO[name]) for name in NEEDED) / 1e6
    assert caught.value.hint.startswith(f"Did you mean {meant!r} ({size:.1f} MB to download, ")
    assert caught.value.hint.endswith(f" free)? Run: sglang pull {meant}")


def test_what_a_known_one_takes_is_left_out_where_the_hub_does_not_tell(
    hub: TinyHub, cache: Path
) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("flux.2-dev", cache_dir=cache, known=NAMES)
    meant = "black-forest-labs/FLUX.2-dev"
    assert caught.value.hint == f"Did you mean {meant!r}? Run: sglang pull {meant}"


def test_pickle_on_the_hub_is_refused_before_anything_is_fetched(hub: TinyHub, cache: Path) -> None:
    with pytest.raises(SetupError, match=r"pytorch_model\.bin") as caught:
        resolve_model("org/pickled", cache_dir=cache)
    assert caught.value.code == "pickle_refused"
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_pickle_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.ckpt").write_bytes(b"0")
    with pytest.raises(SetupError, match="pickle"):
        resolve_model(str(tmp_path))
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"0")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_repository_without_usable_files(hub: TinyHub, cache: Path) -> None:
    with pytest.raises(SetupError, match="no file this program can use"):
        resolve_model("org/empty", cache_dir=cache)


def test_offline_only_the_cache_counts(
    hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("org/wan-tiny", cache_dir=cache) == folder
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/other", cache_dir=cache)
    assert hub.requests == []


def test_an_unreachable_hub(hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert resolve_model("org/wan-tiny", cache_dir=cache) == folder
        with pytest.raises(ModelNotFoundError, match="cannot be reached") as caught:
            resolve_model("org/elsewhere", cache_dir=cache)
    assert "Errno" not in str(caught.value)


def test_a_full_disk_is_not_blamed_on_the_hub(
    hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "secret")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(SetupError, match="cannot be stored: No space left") as caught:
        resolve_model("org/wan-tiny", cache_dir=cache)
    assert "HF_HOME" in caught.value.hint


def test_a_wrong_path_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "wan-model").mkdir()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(str(tmp_path / "wan-modle"))
    assert caught.value.hint == "Did you mean 'wan-model'?"


@pytest.mark.parametrize("name", ["a/b/c", "org/", "a..b", "org/model.git", "sp ace", "/nowhere"])
def test_what_cannot_be_an_id_is_looked_for_as_a_folder_only(hub: TinyHub, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no folder"):
        resolve_model(name)
    assert hub.requests == []


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.safetensors", "config.json"], ["a.safetensors", "config.json"]),
        (["model_index.json", "a.safetensors"], ["model_index.json"]),
        (["v/m.fp16.safetensors", "v/m.safetensors"], ["v/m.safetensors"]),
        (["v/m.fp16.safetensors", "v/config.json"], ["v/m.fp16.safetensors", "v/config.json"]),
        (
            ["t/m-00001-of-00002.safetensors", "t/m.safetensors.index.json"],
            ["t/m-00001-of-00002.safetensors", "t/m.safetensors.index.json"],
        ),
        (
            ["t/m.fp16-00001-of-00002.safetensors", "t/m.safetensors.index.fp16.json",
             "t/m.safetensors"],
            ["t/m.safetensors"],
        ),
        (["x.bin", "run.py", "README.md"], []),
    ],
)  # fmt: skip
def test_files_worth_having(names: list[str], chosen: list[str]) -> None:
    assert choose_files(names) == chosen


def test_files_of_a_variant_and_the_plain_ones_where_it_is_not() -> None:
    names = ["v/m.fp16.safetensors", "v/m.safetensors", "v/m.bf16.safetensors", "t/m.safetensors",
             "u/m.safetensors.index.json", "u/m.safetensors.index.fp16.json",
             "u/m-00001-of-00001.safetensors", "u/m-00001-of-00001.fp16.safetensors"]  # fmt: skip
    assert choose_files(names, variant="fp16") == [names[0], names[3], names[5], names[7]]


def test_a_long_download_says_how_far_it_is(
    hub: TinyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_diffusion.loader.progress.EVERY_SECONDS", 0.0)
    notes: list[str] = []
    resolve_model("org/wan-tiny", cache_dir=cache, note=notes.append)
    assert notes[-1].startswith("downloading org/wan-tiny: 1.0 MB of 1.")
    assert all(" of " in note and note.endswith("MB") for note in notes)


WEIGHT = "transformer/diffusion_pytorch_model.safetensors"


def test_what_the_disk_cannot_take_is_refused_before_a_byte_comes(
    hub: TinyHub, cache: Path
) -> None:
    hub.sizes[WEIGHT] = 10**18
    with pytest.raises(SetupError, match=r"needs 1000000000\.00 GB more in .* are free"):
        resolve_model("org/wan-tiny", cache_dir=cache)
    assert not hub.bytes_asked(WEIGHT)


def test_a_second_attempt_says_where_it_goes_on(hub: TinyHub, cache: Path) -> None:
    shards = {f"transformer/m-0000{i}-of-00002.safetensors": WEIGHTS[i:] for i in (1, 2)}
    hub.repos["org/sharded"] = {"model_index.json": b"{}", **shards}
    resolve_model("org/sharded", cache_dir=cache, allow=["*-00001-of-*"])  # and there it ended
    notes: list[str] = []
    numbers: list[tuple[int, int]] = []
    folder = resolve_model(
        "org/sharded",
        cache_dir=cache,
        note=notes.append,
        report=lambda done, total: numbers.append((done, total)),
    )
    assert notes == ["resuming org/sharded at 1.0 MB of 2.1 MB"]
    assert all((folder / name).read_bytes() == data for name, data in shards.items())
    assert len(hub.bytes_asked("m-00001-of-00002.safetensors")) == 1
    assert (
        numbers[-1][0] == numbers[-1][1] >= len(shards["transformer/m-00002-of-00002.safetensors"])
    )


def test_checksums(hub: TinyHub, cache: Path) -> None:
    folder = resolve_model("org/wan-tiny", cache_dir=cache)
    assert check_sums("org/wan-tiny", folder) == 1
    (folder / WEIGHT).resolve().write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(SetupError, match=f"{WEIGHT} arrived damaged"):
        check_sums("org/wan-tiny", folder)
    assert (resolve_model("org/wan-tiny", cache_dir=cache) / WEIGHT).read_bytes() == WEIGHTS
    assert check_sums("org/wan-tiny", folder) == 1

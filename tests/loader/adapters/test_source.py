"""Where adapter files come from: a file, a folder, the hub; one file or one for each expert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.families.registry import family_of
from sgl_diffusion.loader.adapters.read import read_adapter
from sgl_diffusion.loader.adapters.source import choose, expert_of, locate
from tests.loader.adapters.tiny import pair, read
from tests.loader.tiny_hub import COMMIT, TinyHub, serving

WAN = "WanTransformer3DModel"
HIGH, LOW = "style_high_noise_v1.safetensors", "style_low_noise_v1.safetensors"
DATA = save(pair("blocks.0.attn1.to_q", (64, 64)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.safetensors").write_bytes(DATA)
    (tmp_path / "README.md").touch()
    return tmp_path


def test_a_file_or_the_folder_that_holds_it(folder: Path) -> None:
    file = folder / "a.safetensors"
    assert locate(str(file)).files == {"": file}
    assert locate(str(folder)).files == {"": file}
    assert locate(str(folder), weight_name="a.safetensors").files == {"": file}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("missing.safetensors", "There is no adapter file"),
        ("README.md", "not a .safetensors file"),
        ("a.bin", "not a .safetensors file"),
        ("/etc/passwd", "not a .safetensors file"),
        ("a\0b", "not a .safetensors file"),
        ("x" * 5000, "not a path"),
        ("~no-such-user/x", "not a path"),
    ],
)
def test_other_files_are_refused_unopened(path: str, why: str, folder: Path) -> None:
    place = path if path[0] in "/~x" else str(folder / path)
    (folder / "a.bin").write_bytes(b"pickle")
    (folder / "a.bin").chmod(0)
    with pytest.raises(RequestError, match=why) as caught:
        locate(place)
    assert (caught.value.code, caught.value.param) == ("invalid_lora", "lora_path")


def test_files_that_are_too_large_are_not_read(folder: Path) -> None:
    size = len(DATA)
    assert read(folder, WAN, most_bytes=size).layers == 1
    (folder / "a.safetensors").write_bytes(bytes(size + 1))
    with pytest.raises(RequestError, match="--max-lora-memory") as caught:
        read(folder, WAN, most_bytes=size)
    assert caught.value.code == "lora_memory_full"


def test_a_folder_with_several_needs_a_weight_name(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(DATA)
    with pytest.raises(RequestError, match="2 adapter files: a.safetensors, b.saf") as caught:
        locate(str(folder))
    assert caught.value.param == "lora_weight_name"
    assert locate(str(folder), weight_name="b.safetensors").files == {"": folder / "b.safetensors"}
    with pytest.raises(RequestError, match="no file c.safetensors") as caught:
        locate(str(folder), weight_name="c.safetensors")
    assert "a.safetensors, b.safetensors" in caught.value.hint
    for name in ("../a.safetensors", "/a.safetensors", "a.bin", ""):
        with pytest.raises(RequestError, match="is not a .safetensors file"):
            locate(str(folder), weight_name=name)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no .safetensors file"):
        locate(str(tmp_path))
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(RequestError, match="only adapter_model.bin, which could run code"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_i2v_A14b_high_noise_lora_rank64.safetensors", "transformer"),
        ("Wan2.2-Fun-A14B-low-noise-MPS.safetensors", "transformer_2"),
        ("girl_HighNoise.safetensors", "transformer"),
        ("girl_lownoise.safetensors", "transformer_2"),
        ("girl_hinoise.safetensors", "transformer"),
        ("high_quality.safetensors", ""),
        ("slow_noise_and_high_noise.safetensors", ""),
        ("noise.safetensors", ""),
    ],
)
def test_experts_by_the_name(name: str, expert: str) -> None:
    assert expert_of(name) == expert


def test_a_file_for_each_expert(tmp_path: Path) -> None:
    (tmp_path / HIGH).write_bytes(DATA)
    (tmp_path / LOW).write_bytes(save(pair("blocks.1.attn1.to_q", (64, 64), rank=2)))
    files = locate(str(tmp_path), experts=True).files
    assert files == {"transformer": tmp_path / HIGH, "transformer_2": tmp_path / LOW}
    assert locate(str(tmp_path), weight_name=f"{LOW}, {HIGH}", experts=True).files == files
    both = read(tmp_path, WAN, experts=True)
    assert {component: list(modules) for component, modules in both.components.items()} == {
        "transformer": ["blocks.0.attn1.to_q"],
        "transformer_2": ["blocks.1.attn1.to_q"],
    }
    assert both.ranks == (2, 4)
    low = read(tmp_path / LOW, WAN, experts=True)
    assert list(low.components) == ["transformer_2"] and not low.of("transformer")
    # A model with one transformer takes such a file as any other.
    assert list(read(tmp_path / LOW, WAN).components) == ["transformer"]
    with pytest.raises(RequestError, match="2 adapter files"):
        locate(str(tmp_path))
    with pytest.raises(RequestError, match="two experts"):
        locate(str(tmp_path), weight_name=f"{LOW},{HIGH}")


def test_a_pair_may_leave_noise_out() -> None:
    names = ["arcane_high.safetensors", "arcane_low.safetensors"]
    assert choose(names, None, True, "x") == names
    with pytest.raises(RequestError, match="2 adapter files"):
        choose(["arcane_high.safetensors", "arcane_slow.safetensors"], None, True, "x")


def test_one_file_with_both_experts(tmp_path: Path) -> None:
    file = pair("high_noise_model.blocks.0.self_attn.q", (64, 64), ("lora_down", "lora_up"))
    file |= pair("low_noise_model.blocks.0.self_attn.q", (64, 64), ("lora_down", "lora_up"))
    (tmp_path / "a.safetensors").write_bytes(save(file))
    adapter = read(tmp_path, WAN, experts=True)
    assert set(adapter.components) == {"transformer", "transformer_2"}
    (tmp_path / "a.safetensors").rename(tmp_path / LOW)
    with pytest.raises(RequestError, match="named after one expert, but holds both"):
        read(tmp_path, WAN, experts=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    files = {
        "adapter_model.safetensors": DATA,
        "adapter_config.json": json.dumps({"lora_alpha": 2, "peft_type": "LORA"}).encode(),
        "model.bin": b"pickle",
        "run.py": b"raise SystemExit",
    }
    repos = {
        "org/one": files,
        "org/many": {"a.safetensors": DATA, "sub/b.safetensors": DATA},
        "org/pickle": {"a.bin": b"pickle"},
        "org/pair": {HIGH: DATA, LOW: DATA},
    }
    with serving(TinyHub(repos)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield served


def _names(hub: TinyHub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET"}


def test_hub_repository(hub: TinyHub, tmp_path: Path) -> None:
    source = locate("org/one", cache_dir=tmp_path)
    assert source.files[""].read_bytes() == DATA
    assert not _names(hub) & {"model.bin", "run.py"}
    adapter = read_adapter("org/one", family_of(WAN), revision=COMMIT, cache_dir=tmp_path)
    assert (adapter.alpha, adapter.path) == (2, "org/one")


def test_a_file_of_a_repository(hub: TinyHub, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no file c.safetensors"):
        locate("org/many:c.safetensors", cache_dir=tmp_path)
    source = locate("org/many:sub/b.safetensors", cache_dir=tmp_path)
    assert source.files[""].parts[-2:] == ("sub", "b.safetensors")
    assert "a.safetensors" not in _names(hub)
    assert locate("org/many", cache_dir=tmp_path).files[""].name == "a.safetensors"
    with pytest.raises(RequestError, match="differ"):
        locate("org/many:a.safetensors", weight_name="b.safetensors", cache_dir=tmp_path)


def test_a_pair_in_a_repository(hub: TinyHub, tmp_path: Path) -> None:
    source = locate("org/pair", experts=True, cache_dir=tmp_path)
    assert list(source.files) == ["transformer", "transformer_2"]


@pytest.mark.parametrize(
    ("path", "options", "why"),
    [
        ("org/pickle", {}, "only a.bin, which could run code"),
        ("org/none", {}, "no public repository"),
        ("org/one", {"revision": "nope"}, "no revision nope"),
    ],
)
def test_what_the_hub_lacks(
    path: str, options: dict[str, str], why: str, hub: TinyHub, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        locate(path, cache_dir=tmp_path, **options)
    assert caught.value.code == "invalid_lora"


def test_local_is_decided_by_the_caller(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "org" / "one"
    here.mkdir(parents=True)
    (here / "mine.safetensors").write_bytes(DATA)
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    assert locate("org/one", cache_dir=cache).files[""].name == "mine.safetensors"
    assert locate("org/one", local=False, cache_dir=cache).files[""].name != "mine.safetensors"

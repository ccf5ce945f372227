"""Weights from safetensors files into a module on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.loader.files import weight_files
from sgl_diffusion.loader.rules import Rule, Rules
from sgl_diffusion.loader.weights import load_weights
from tests.fixtures_wan import load_transformer

SINGLE = "diffusion_pytorch_model.safetensors"


class Net(nn.Module):
    KEEP_FP32 = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Linear(4, {"q": 4, "k": 4, "v": 6})
        self.embed = Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.empty(1, 2, 4))


RULES = Rules(
    *(Rule(f"attn.to_{name}", "qkv", segment=name) for name in "qkv"),
    Rule("patch", "embed", flatten=True),
    ignore=("unused.{i}",),
)


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "attn.to_q.weight": draw(4, 4),
        "attn.to_q.bias": draw(4),
        "attn.to_k.weight": draw(4, 4),
        "attn.to_k.bias": draw(4),
        "attn.to_v.weight": draw(6, 4),
        "attn.to_v.bias": draw(6),
        "patch.weight": draw(4, 2, 1, 2, 2),
        "patch.bias": draw(4),
        "norm.weight": draw(4),
        "norm.bias": draw(4),
        "table": draw(1, 2, 4),
        "unused.0.weight": draw(3),
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Net:
    with torch.device("meta"):
        net = Net()
    load_weights(net, folder, RULES, dtype=dtype)
    return net


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    save_file(weights, folder / SINGLE)
    return folder


def test_renamed_fused_and_flattened(tmp_path: Path) -> None:
    given = checkpoint()
    net = load(save(tmp_path, given))
    q, k, v = (given[f"attn.to_{name}.weight"] for name in "qkv")
    assert torch.equal(net.qkv.weight, torch.cat((q, k, v)))
    assert torch.equal(net.qkv.bias[net.qkv.segments["v"]], given["attn.to_v.bias"])
    assert torch.equal(net.embed.weight, given["patch.weight"].flatten(1))
    assert torch.equal(net.table, given["table"])
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    given = {key: value.to(stored) for key, value in checkpoint().items()}
    net = load(save(tmp_path, given), wanted)
    assert torch.equal(net.embed.bias, given["patch.bias"].to(wanted))
    assert net.norm.weight.dtype == torch.float32
    assert torch.equal(net.norm.weight, given["norm.weight"].float())


def shard(folder: Path, weights: dict[str, Tensor], count: int) -> None:
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    where = {key: names[i % count] for i, key in enumerate(weights)}
    for name in names:
        save_file({k: v for k, v in weights.items() if where[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_equal_one_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    shard(tmp_path / "many", checkpoint(), 3)
    one, many = load(save(tmp_path / "one", checkpoint())), load(tmp_path / "many")
    for name, value in one.state_dict().items():
        assert torch.equal(value, many.state_dict()[name]), name


def test_every_weight_of_a_real_checkpoint_arrives(tiny_wan_a: Path) -> None:
    stored = load_file(tiny_wan_a / "transformer" / SINGLE)
    loaded = load_transformer(tiny_wan_a).state_dict()
    assert sum(v.numel() for v in loaded.values()) == sum(v.numel() for v in stored.values())
    assert torch.equal(
        loaded["blocks.1.attn2.to_kv.weight"],
        torch.cat([stored[f"blocks.1.attn2.to_{x}.weight"] for x in "kv"]),
    )


def test_misfits_are_all_named_at_once(tmp_path: Path) -> None:
    given = checkpoint()
    del given["attn.to_k.bias"], given["table"]
    given["attn.to_q.weight"] = torch.zeros(5, 4)
    given["stray.weight"] = torch.zeros(2)
    given["norm.bias"] = torch.zeros(4, dtype=torch.int8)
    with pytest.raises(SetupError) as caught:
        load(save(tmp_path, given))
    text = caught.value.message
    assert "missing: attn.to_k.bias, table" in text
    assert "unexpected: stray.weight" in text
    assert "wrong shape: attn.to_q.weight [5, 4] for [4, 4]" in text
    assert "wrong type: norm.bias I8" in text
    assert caught.value.code == "bad_checkpoint"


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    given = checkpoint() | {f"stray.{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(SetupError, match="and 22 more"):
        load(save(tmp_path, given))


def test_a_failed_load_allocates_nothing(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(SetupError):
        load_weights(net, save(tmp_path, {"table": torch.zeros(1)}), RULES, dtype=torch.float32)
    assert all(p.is_meta for p in net.parameters())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("truncated", "is damaged"),
        ("header", "is damaged"),
        ("length", "is damaged"),
        ("empty", "is empty. Delete it and download it again."),
        ("pointer", "is a pointer of Git LFS .* `git lfs pull`"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: str, text: str) -> None:
    file = save(tmp_path, checkpoint()) / SINGLE
    data = file.read_bytes()
    file.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "header": data[:8] + b"}" * 20 + data[28:],
            "length": b"\xff" * 8 + data[8:],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        }[damage]
    )
    with pytest.raises(SetupError, match=f"{SINGLE} {text}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickle_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(checkpoint(), tmp_path / name)
    with pytest.raises(SetupError, match="pickle") as caught:
        load(tmp_path)
    assert caught.value.code == "pickle_refused"


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no safetensors weights"):
        weight_files(tmp_path)


def test_a_variant_is_second_choice(tmp_path: Path) -> None:
    (tmp_path / "model.fp16.safetensors").touch()
    assert [f.name for f in weight_files(tmp_path)] == ["model.fp16.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_sharded_variant_is_second_choice(tmp_path: Path) -> None:
    shard(tmp_path, checkpoint(), 2)
    plain = weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.fp16.json").write_text("{}")
    (tmp_path / "model-00001-of-00001.fp16.safetensors").touch()
    assert weight_files(tmp_path) == plain


def test_unrelated_files_are_not_guessed_between(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "two.safetensors").touch()
    with pytest.raises(SetupError, match=r"one\.safetensors, two\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "y"}}']
)
def test_a_bad_index(tmp_path: Path, index: str) -> None:
    (tmp_path.parent / "x.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SetupError):
        weight_files(tmp_path)

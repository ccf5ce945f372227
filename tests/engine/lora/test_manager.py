"""Sets of adapters on real weights: merged, taken out bit for bit, all or nothing."""

from __future__ import annotations

import copy
import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConflictError, NotFoundError, RequestError, SetupError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.engine.lora.manager import Loras
from sgl_diffusion.engine.lora.rows import Blend
from sgl_diffusion.loader.adapters.types import (
    Adapter,
    Dora,
    FullDelta,
    Hada,
    Kron,
    LowRank,
)
from sgl_diffusion.models.wan import WanTransformer
from sgl_diffusion.models.wan_weights import RULES
from sgl_diffusion.orchestrator.stage import CannotGoOnError
from tests.engine.lora.adapters import LAYERS, Shelf, low_rank, prepare, prepare_job
from tests.fixtures_wan import load_transformer


def setting(name: str, strength: float = 1.0, target: str = "all", **more: object) -> LoraSetting:
    fields = {"path": name, **more}
    return LoraSetting(nickname=name, strength=strength, target=target, **fields)  # type: ignore[arg-type]


def digest(*models: WanTransformer) -> str:
    whole = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            whole.update(name.encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def other_kinds() -> Adapter:
    """One change of every kind that keeps a copy, two on a fused weight, biases, and low ranks."""
    make = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=make)

    low = LowRank(noise(4, 64), noise(64, 4), 2.0)
    return Adapter(
        "LyCORIS",
        "other",
        {
            "transformer": {
                "blocks.0.attn1.to_q": (low,),
                "blocks.0.attn1.to_k": (Dora(low, 1 + noise(64)),),
                "blocks.0.attn1.to_out.0": (FullDelta(noise(64, 64)), FullDelta(noise(64), "bias")),
                "blocks.0.attn2.to_v": (
                    Hada(noise(64, 4), noise(4, 64), noise(64, 4), noise(4, 64)),
                ),
                "blocks.0.ffn.net.2": (Kron((noise(8, 8),), (noise(8, 16),)),),
                "blocks.1.attn1.to_v": (low, FullDelta(noise(64), "bias")),
                "blocks.1.attn1.norm_q": (FullDelta(noise(64)),),
                "blocks.1": (FullDelta(noise(1, 6, 64), "scale_shift_table"),),
                "patch_embedding": (LowRank(noise(2, 64), noise(64, 2)),),
            }
        },
    )


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def model(request: pytest.FixtureRequest, tiny_wan_a: Path) -> WanTransformer:
    return load_transformer(tiny_wan_a, request.param)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(
        a=low_rank(1),
        b=low_rank(2, rank=16, dtype=torch.bfloat16),
        c=low_rank(3, names=list(LAYERS)[::3]),
        other=other_kinds(),
    )


def test_a_hundred_random_sequences_leave_no_trace(model: WanTransformer, shelf: Shelf) -> None:
    second = copy.deepcopy(model)
    manager = shelf.manager(model, second, rules=RULES)
    loaded = digest(model, second)
    places = [p.data_ptr() for m in (model, second) for p in m.parameters()]
    names = [*shelf.adapters]
    prepare(manager, *(setting(name) for name in names))
    choose = random.Random(7)
    seen = set()
    for _ in range(100):
        for _ in range(choose.randint(1, 3)):
            act = choose.random()
            if act < 0.6:
                some = choose.sample(names, choose.randint(1, len(names)))
                mode = "auto" if "other" in some else choose.choice(["merge", "auto", "dynamic"])
                wanted = [
                    setting(n, choose.uniform(-2, 2), choose.choice(["all", "transformer"]))
                    for n in some
                ]
                manager.replace(wanted, mode)
            elif act < 0.8:
                manager.unmerge(choose.choice(["all", "transformer", "transformer_2"]))
            elif manager.report()["active"] or manager.report()["unmerged"]:
                manager.merge(choose.choice(["all", "transformer"]), choose.uniform(-1, 2))
        seen.add(digest(model, second))
        manager.unmerge("all")
        assert digest(model, second) == loaded
        assert manager.report()["memory"]["unmerge_bytes"] == 0
    assert len(seen) > 60, "the sets in between did change the weights"
    # A captured graph reads the weights where they were.
    assert places == [p.data_ptr() for m in (model, second) for p in m.parameters()]


def test_merged_weights_are_the_sum_rounded_once(model: WanTransformer, shelf: Shelf) -> None:
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manager = shelf.manager(model, rules=RULES)
    prepare(manager, setting("a"), setting("other"))
    manager.replace([setting("a", 0.5), setting("other", 2.0)], "merge")
    a = shelf.adapters["a"].components["transformer"]
    other = shelf.adapters["other"].components["transformer"]

    def want(ours: str, start: int, *changes: tuple[object, float]) -> None:
        tensor, old = model.state_dict()[ours], base[ours]
        total = old.to(torch.float32, copy=True)
        for change, strength in changes:
            delta = change.delta(old[start : start + change.shape[0]], strength)  # type: ignore[attr-defined]
            rows = slice(start, start + delta.shape[0])
            total[rows] += delta.view_as(total[rows])
        found = tensor[rows].float()
        unit = torch.finfo(tensor.dtype).eps
        assert not torch.equal(tensor[rows], old[rows])
        torch.testing.assert_close(
            found, total[rows].to(tensor.dtype).float(), rtol=unit, atol=1e-6
        )

    (to_q,), (to_q_2,) = a["blocks.0.attn1.to_q"], other["blocks.0.attn1.to_q"]
    want("blocks.0.attn1.to_qkv.weight", 0, (to_q, 0.5), (to_q_2, 2.0))
    (to_k,), (dora,) = a["blocks.0.attn1.to_k"], other["blocks.0.attn1.to_k"]
    want("blocks.0.attn1.to_qkv.weight", 64, (to_k, 0.5), (dora, 2.0))
    weight, bias = other["blocks.0.attn1.to_out.0"]
    want("blocks.0.attn1.to_out.weight", 0, (a["blocks.0.attn1.to_out.0"][0], 0.5), (weight, 2.0))
    want("blocks.0.attn1.to_out.bias", 0, (bias, 2.0))
    want("blocks.1.attn1.to_qkv.bias", 128, (other["blocks.1.attn1.to_v"][1], 2.0))
    want("blocks.1.scale_shift_table", 0, (other["blocks.1"][0], 2.0))
    want("patch_embedding.weight", 0, (other["patch_embedding"][0], 2.0))
    memory = manager.report()["memory"]
    assert memory["copied_layers"] >= 7 and memory["unmerge_bytes"] > 0


def test_side_data_stays_small(tiny_wan_b: Path) -> None:
    model = load_transformer(tiny_wan_b, torch.bfloat16)
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n}
    names = [n.removesuffix(".weight") for n in shapes if "ffn" in n or "to_out" in n]
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name in names:
        weight = model.get_submodule(name).weight.float()
        out, width = weight.shape
        down = torch.randn(16, width, generator=generator)
        up = torch.randn(out, 16, generator=generator)
        ratio = 0.6 * weight.norm() / (up @ down).norm()
        theirs = RULES.source(name)
        modules[theirs] = (LowRank(down.bfloat16(), (up * ratio).bfloat16()),)
    shelf = Shelf(a=Adapter("PEFT", "a", {"transformer": modules}))
    manager = shelf.manager(model, rules=RULES)
    prepare(manager, setting("a"))
    manager.replace([setting("a")], "merge")
    memory = manager.report()["memory"]
    assert 0 < memory["unmerge_bits_per_weight"] <= 5 and memory["copied_layers"] == 0


def test_a_set_is_replaced_as_a_whole_or_not_at_all(
    model: WanTransformer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = shelf.manager(model, rules=RULES)
    prepare(manager, setting("a"), setting("b"), setting("other"))
    manager.replace([setting("a", 0.7)], "merge")
    merged, active = digest(model), manager.report()["active"]

    def broken(*_: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Hada, "delta", broken)
        with pytest.raises(MemoryError):
            manager.replace([setting("other"), setting("b")], "merge")
    assert digest(model) == merged and manager.report()["active"] == active

    for wrong, error in (
        ([setting("a"), LoraSetting(nickname="nobody")], NotFoundError),
        ([setting("b", target="transformer_2")], RequestError),
        ([setting("b", target="critic")], RequestError),
    ):
        with pytest.raises(error):
            manager.replace(wrong, "merge")
        assert digest(model) == merged and manager.report()["active"] == active

    def lost(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(ops, "lora_merge_", lost)
    with pytest.raises(CannotGoOnError):
        manager.replace([setting("b")], "merge")


def test_what_does_not_fit_is_named(model: WanTransformer, shelf: Shelf) -> None:
    manager = shelf.manager(model, rules=RULES)
    bad = {
        "wide": ({"blocks.0.attn1.to_q": LowRank(torch.ones(2, 65), torch.ones(64, 2))}, "64x65"),
        "tall": ({"blocks.0.attn1.to_q": LowRank(torch.ones(2, 64), torch.ones(65, 2))}, "64x64"),
        "nan": (
            {"blocks.0.attn1.to_q": LowRank(torch.full((2, 64), torch.nan), torch.ones(64, 2))},
            "not finite",
        ),
        "bias": ({"blocks.0.attn1.norm_q": FullDelta(torch.ones(64), "bias")}, "no bias"),
        "none": (
            {"blocks.9.attn1.to_q": LowRank(torch.ones(2, 64), torch.ones(64, 2))},
            "no layer",
        ),
    }
    for name, (modules, text) in bad.items():
        deltas = {module: (delta,) for module, delta in modules.items()}
        shelf.adapters[name] = Adapter("PEFT", name, {"transformer": deltas})
        with pytest.raises(RequestError, match=text) as caught:
            prepare(manager, setting("a"), setting(name))
        assert caught.value.code == "invalid_lora"
    assert manager.report()["loaded_adapters"] == [], "a request that fails leaves nothing behind"

    partly = dict(low_rank(1).components["transformer"])
    partly["blocks.7.attn1.to_q"] = partly["blocks.0.attn1.to_q"]
    text = {"text_model.layers.0.q_proj": (LowRank(torch.ones(1, 4), torch.ones(4, 1)),)}
    shelf.adapters["partly"] = Adapter(
        "PEFT", "partly", {"transformer": partly, "text_encoder": text}, unmatched=("lora_te_x",)
    )
    prepare(manager, setting("partly"))
    (listed,) = manager.report()["loaded_adapters"]
    assert listed["unmatched"] == [
        "lora_te_x",
        "transformer.blocks.7.attn1.to_q",
        "text_encoder.text_model.layers.0.q_proj",
    ]
    assert listed["num_lora_layers_with_weights"] == len(LAYERS)


def test_a_file_for_both_experts_goes_to_both_and_a_target_to_one(
    model: WanTransformer, shelf: Shelf
) -> None:
    second = copy.deepcopy(model)
    manager = shelf.manager(model, second, rules=RULES)
    prepare(manager, setting("a"))
    base = digest(model)
    manager.replace([setting("a")], "merge")
    assert digest(model) == digest(second) != base
    manager.replace([setting("a", target="transformer_2")], "merge")
    assert digest(model) == base != digest(second)
    manager.merge("transformer_2", 0.5)
    assert manager.report()["active"]["transformer_2"][0]["strength"] == 0.5
    with pytest.raises(ConflictError):
        manager.merge("transformer", 1.0)


def test_the_cache_keeps_what_is_in_use_and_reads_again_what_it_dropped(
    model: WanTransformer, shelf: Shelf
) -> None:
    in_use: list[Blend] = []
    size = low_rank(1).nbytes
    shelf.adapters |= {name: low_rank(i) for i, name in enumerate(("x", "y", "z"))}
    manager = shelf.manager(model, rules=RULES, budget=2 * size, in_use=lambda: in_use)
    for name in ("x", "y", "z"):
        prepare(manager, setting(name))
    held = {a["nickname"]: a["in_memory"] for a in manager.report()["loaded_adapters"]}
    assert held == {"x": False, "y": True, "z": True}
    blend = manager.blend([LoraUse(nickname="x")])
    assert blend is not None and shelf.reads == ["x", "y", "z", "x"]
    in_use.append(blend)
    prepare(manager, setting("y"))
    assert shelf.reads[-1] == "y"
    in_use.append(manager.blend([LoraUse(nickname="y")]))  # type: ignore[arg-type]
    with pytest.raises(ConflictError, match="no room"):
        prepare(manager, setting("z"))
    with pytest.raises(ConflictError, match="A job uses"):
        manager.delete("x")
    in_use.clear()
    manager.delete("x")
    with pytest.raises(NotFoundError):
        manager.delete("x")
    small = shelf.manager(model, rules=RULES, budget=size - 1)
    with pytest.raises(RequestError, match="all adapters together"):
        prepare(small, setting("x"))


def test_a_set_in_use_and_adapters_of_a_job_do_not_mix(model: WanTransformer, shelf: Shelf) -> None:
    manager = shelf.manager(model, rules=RULES)
    prepare(manager, setting("a"), setting("other"))
    assert manager.blend([]) is None
    for mode in ("merge", "dynamic"):
        manager.replace([setting("a")], mode)
        with pytest.raises(ConflictError) as caught:
            manager.blend([LoraUse(nickname="a")])
        assert caught.value.code == "lora_set_in_use"
        with pytest.raises(ConflictError):
            manager.delete("a")
        assert (manager.blend([]) is None) == (mode == "merge")
    manager.unmerge("all")
    assert manager.blend([LoraUse(nickname="a")]) is manager.blend([LoraUse(nickname="a")])
    for refused in (
        lambda: manager.blend([LoraUse(nickname="other")]),
        lambda: manager.replace([setting("other")], "dynamic"),
    ):
        with pytest.raises(RequestError, match=r"can only be merged.*DoRA") as found:
            refused()
        assert found.value.code == "lora_merge_only"


def test_a_job_gives_no_nickname_another_meaning(model: WanTransformer, shelf: Shelf) -> None:
    manager = shelf.manager(model, rules=RULES)
    pen = LoraUse(nickname="pen", path="a")
    prepare(manager, LoraSetting(nickname="pen", path="a", alpha=2.0, revision="v1"))
    (accepted,) = prepare_job(manager, pen)
    assert accepted == replace(pen, alpha=2.0, revision="v1", accepted=True)
    (known,) = manager.report()["loaded_adapters"]
    assert (known["path"], known["alpha"], known["revision"]) == ("a", 2.0, "v1")
    others = ({"path": "b"}, {"alpha": 1.0}, {"revision": "v2"}, {"weight_name": "a.safetensors"})
    for other in others:
        with pytest.raises(ConflictError) as caught:
            manager.prepare_job([replace(pen, **other)])
        assert caught.value.code == "lora_nickname_taken"
    assert shelf.reads == ["a"]
    prepare(manager, LoraSetting(nickname="pen", path="b"))  # whoever sets for all jobs may
    assert manager.report()["loaded_adapters"][0]["path"] == "b"
    # A job that was accepted before has what it was accepted with, and takes no nickname away.
    blend = manager.blend([accepted])
    assert blend is not None
    assert [(source.path, source.alpha) for source in blend.sources] == [("a", 2.0)]
    assert prepare_job(manager, accepted) == [accepted]
    assert manager.report()["loaded_adapters"][0]["path"] == "b"
    # What is said of a known adapter beside its path is another file of it.
    prepare(manager, LoraSetting(nickname="pen", weight_name="b.safetensors"))
    assert shelf.reads == ["a", "b", "b"]
    (known,) = manager.report()["loaded_adapters"]
    assert (known["path"], known["weight_name"]) == ("b", "b.safetensors")


def test_the_next_worker_takes_up_the_set(
    model: WanTransformer, shelf: Shelf, tmp_path: Path
) -> None:
    state = tmp_path / "loras.json"

    def worker(on: WanTransformer) -> Loras:
        return shelf.manager(on, rules=RULES, state=state)

    fresh = copy.deepcopy(model)
    first = worker(model)
    first.start([])
    prepare(first, setting("a"), setting("b"))
    first.replace([setting("a", 0.4), setting("b", -1)], "merge")
    second = worker(fresh)
    second.start([setting("c")])  # the set that was changed to wins over the one to begin with
    assert digest(fresh) == digest(model)
    assert second.report()["active"] == first.report()["active"]
    first.unmerge("all")
    third = worker(copy.deepcopy(model))
    third.start([])
    assert third.report()["active"] == {} and "transformer" in third.report()["unmerged"]

    del shelf.adapters["a"]
    second.merge("all", 1.0)
    with pytest.raises(SetupError, match=r"cannot be loaded again.*loras\.json"):
        worker(model).start([])
    state.write_text("{")
    with pytest.raises(SetupError, match="cannot be read"):
        worker(model).start([])
    state.unlink()
    with pytest.raises(SetupError):
        worker(model).start([setting("nothing")])

"""Adapters in tensors that stay: layouts, what is copied and when, and equal results."""

from __future__ import annotations

import gc

import torch
from torch import nn

from sgl_diffusion import ops
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.lora.layout import Layout, Layouts, Span
from sgl_diffusion.engine.lora.rows import Blend
from sgl_diffusion.engine.lora.slots import Slots
from sgl_diffusion.ops import LoraDelta

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 30)
        self.second = nn.Linear(30, 24)


def delta(
    seed: int, rank: int, width: int, rows: int, start: int = 0, scale: float = 1.0
) -> LoraDelta:
    make = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, width, generator=make), torch.randn(rows, rank, generator=make)
    return LoraDelta(down, up, scale, start)


def blend(**layers: tuple[LoraDelta, ...] | nn.Module) -> Blend:
    model = layers.pop("model")
    assert isinstance(model, nn.Module)
    return Blend((), {model.get_submodule(name): each for name, each in layers.items()})  # type: ignore[misc]


def copies(counters: Counters) -> int:
    return int(sum(metric.value for metric in counters.metrics()))


def test_a_layout_is_the_same_for_adapters_that_can_take_each_others_places() -> None:
    model = Model()
    layouts = Layouts([model])
    a = blend(model=model, first=(delta(0, 4, 24, 30),), second=(delta(1, 4, 30, 24),))
    b = blend(model=model, second=(delta(2, 16, 30, 24, scale=-2.0),), first=(delta(3, 1, 24, 30),))
    found = layouts.of([a])
    assert found == layouts.of([b]) and hash(found) == hash(layouts.of([b]))
    assert [module for module, _ in found.layers] == [model.first, model.second]
    assert found.layers[0][1] == (Span(0, 30, 24, 16, torch.float32),)
    assert found.adapter_bytes == 4 * 16 * (24 + 30) * 2
    both = layouts.of([a, b])
    assert both.layers == found.layers and both.adapters == 2 and both.nbytes == 2 * found.nbytes
    assert both == layouts.of([b, a]) != found
    others = [
        blend(model=model, first=(delta(0, 4, 24, 30),)),
        blend(model=model, first=(delta(0, 17, 24, 30),), second=(delta(1, 4, 30, 24),)),
        blend(model=model, first=(delta(0, 4, 24, 20, 10),), second=(delta(1, 4, 30, 24),)),
    ]
    assert len({found, *(layouts.of([other]) for other in others)}) == 4
    elsewhere = Model()
    assert layouts.of([blend(model=elsewhere, first=(delta(0, 4, 24, 30),))]).layers == ()


def test_a_layout_has_room_for_all_of_its_adapters() -> None:
    """Segments of their own, several changes of one, dtypes that no factor is rounded to."""
    model = Model()
    narrow = delta(0, 4, 24, 10, 10)
    half = LoraDelta(narrow.down.bfloat16(), narrow.up.bfloat16(), 1.0, 10)
    a = blend(model=model, first=(half, half, half, half, half))
    b = blend(model=model, first=(delta(1, 2, 24, 30), delta(2, 3, 24, 10, 10)))
    found = Layouts([model]).of([a, b])
    assert found.layers[0][1] == (
        Span(0, 30, 24, 16, torch.float32),
        Span(10, 10, 24, 32, torch.float32),
    )
    assert Layouts([model]).of([a]).layers[0][1] == (Span(10, 10, 24, 32, torch.bfloat16),)


def check(slots: Slots, blends: list[Blend | None], model: Model) -> None:
    """The slots' tensors change outputs as the adapters themselves do."""
    index = slots.write(blends)
    wanted = list(dict.fromkeys(each for each in blends if each is not None))
    own = torch.tensor([-1 if each is None else wanted.index(each) for each in blends])
    for module, stack in slots.stacks.items():
        assert isinstance(module, nn.Linear)
        x = torch.randn(len(blends), 5, module.in_features)
        y = torch.randn(len(blends), 5, module.out_features)
        adapters = [each.layers.get(module, ()) for each in wanted]
        want = ops.lora_apply(x, y, adapters, own)
        torch.testing.assert_close(ops.lora_apply(x, y, stack, index), want, rtol=2e-6, atol=2e-5)


def test_what_is_written_is_what_is_applied() -> None:
    """Also after adapters of higher ranks, and on layers that only another one reaches."""
    model, counters = Model(), Counters()
    few = blend(model=model, first=(delta(0, 2, 24, 30, scale=0.5),))
    many = blend(
        model=model,
        first=(delta(1, 5, 24, 30, scale=-1.5), delta(2, 7, 24, 30), delta(3, 3, 24, 10, 20)),
        second=(delta(4, 16, 30, 24),),
    )
    layout = Layouts([model]).of([few, many])
    slots = Slots(layout, CPU, counters)
    where = [part.up.data_ptr() for stack in slots.stacks.values() for part in stack.parts]
    for blends in ([few, many], [many, None], [None, few], [many, many], [few, few], [None, None]):
        check(slots, list(blends), model)
    assert copies(counters) == 2
    one = Slots(Layout(1, layout.layers), CPU, counters)
    for each in (many, few, many):
        check(one, [each, None], model)
    assert where == [p.up.data_ptr() for stack in slots.stacks.values() for p in stack.parts]


def test_only_what_is_not_there_is_copied() -> None:
    model, counters = Model(), Counters()
    a, b, c = (blend(model=model, first=(delta(n, 4, 24, 30),)) for n in range(3))
    slots = Slots(Layouts([model]).of([a, b]), CPU, counters)
    for blends, total in (([a, b], 2), ([b, a], 2), ([b, None, b], 2), ([c, b], 3), ([b, a], 4)):
        index = slots.write(blends)
        assert index is slots.index(len(blends)) and copies(counters) == total
        assert [n < 0 for n in index.tolist()] == [each is None for each in blends]
    assert (
        slots.write([b, a]).tolist() == slots.write([b, a]).tolist() != slots.write([a, b]).tolist()
    )


def test_an_adapter_that_was_read_anew_is_copied_anew() -> None:
    """And one that is used by nobody else is not kept because its copy is."""
    model, counters = Model(), Counters()
    slots = None
    for seed in range(3):
        a = blend(model=model, first=(delta(seed, 4, 24, 30),))
        slots = slots or Slots(Layouts([model]).of([a]), CPU, counters)
        check(slots, [a], model)
        held = slots._held[0]
        assert held is not None and held() is a
        del a
        gc.collect()
        assert held() is None
    assert copies(counters) == 3

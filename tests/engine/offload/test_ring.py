"""Blocks that are brought one by one: always the right one, whoever asks, whatever goes wrong."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.engine.offload.ring import Ring
from sgl_diffusion.engine.offload.take_up import take_up
from sgl_diffusion.engine.offload.tiers import Arrival, FromHost, Reader, from_checkpoint
from sgl_diffusion.engine.offload.units import Split, Unit, split
from sgl_diffusion.loader.absent import Absences, AbsentParameter, leave_weights
from sgl_diffusion.loader.weights import load_weights

BLOCKS, WIDTH = 5, 16
CPU = torch.device("cpu")


class Stack(nn.Module):
    KEEP_FP32 = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 3 * WIDTH + number), nn.Linear(3 * WIDTH + number, WIDTH)
            )
            for number in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.norm(x.float())


@pytest.fixture(params=["float32", "bfloat16"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    torch.manual_seed(3)
    dtype = getattr(torch, request.param)
    stored = {key: value.to(dtype) for key, value in Stack().state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    return tmp_path


def whole(folder: Path) -> Stack:
    with torch.device("meta"):
        model = Stack()
    load_weights(model, folder, dtype=torch.bfloat16)
    return model


def absent(folder: Path, name: str = "transformer") -> tuple[Stack, Absences]:
    with torch.device("meta"):
        model = Stack()
    absences = Absences()
    homes = leave_weights(model, folder, dtype=torch.bfloat16, device=CPU)
    absences.add(name, model, homes)
    return model, absences


def offloaded(folder: Path, name: str = "transformer") -> Stack:
    model, absences = absent(folder, name)
    take_up(absences, {name}, CPU, pinned=False)
    return model


def inputs(seed: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_pass_is_that_of_the_whole_module(folder: Path, name: str) -> None:
    model, other = whole(folder), offloaded(folder, name)
    for seed in range(4):
        assert torch.equal(model(inputs(seed)), other(inputs(seed)))
    for block in other.blocks:
        assert all(isinstance(p, AbsentParameter) for p in block.parameters())
        # What is away has no numbers that could be taken for some.
        assert not torch.isfinite(nn.Sequential.forward(block, inputs(0))).any()
    assert all(not isinstance(p, AbsentParameter) for p in other.first.parameters())


def test_all_can_be_brought_at_once(folder: Path) -> None:
    model, absences = absent(folder)
    assert take_up(absences, (), CPU, pinned=False) == ()
    for (name, one), (_, other) in zip(
        whole(folder).named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other) and one.dtype == other.dtype, name


class Recorder(Reader):
    """Reads, and notes what; `wrong` units do not come."""

    def __init__(self) -> None:
        super().__init__(self._note)
        self.read: list[str] = []
        self.wrong: set[str] = set()

    def _note(self, unit: Unit, buffer: Tensor) -> None:
        self.read.append(unit.name)
        if unit.name in self.wrong:
            raise EngineError("the disk is gone")
        buffer.fill_(255)  # what another unit left there is none of this one's
        from_checkpoint(unit, buffer)

    def bring(self, unit: Unit, buffer: Tensor, free: object) -> Arrival:
        return super().bring(unit, buffer, ())


def ring_of(model: Stack, absences: Absences, carrier: Reader, *, keep: bool = True) -> Ring:
    return ring_around(model, split(absences.modules[0]), carrier, keep=keep)


def ring_around(model: Stack, parts: Split, carrier: Reader, *, keep: bool = True) -> Ring:
    (units,) = parts.rings
    ring = Ring(units, carrier, keep=keep)
    ring.watch(model)
    for place in parts.rest:
        value = torch.empty(place.parameter.shape, dtype=place.parameter.dtype)
        place.home.read(value)
        place.owner._parameters[place.leaf] = nn.Parameter(value, requires_grad=False)
    return ring


def test_the_next_is_brought_while_one_computes(folder: Path) -> None:
    model, absences = absent(folder)
    carrier = Recorder()
    ring = ring_of(model, absences, carrier)
    for seed in range(3):
        model(inputs(seed))
    names = [f"blocks.{number}" for number in range(BLOCKS)]
    assert carrier.read[:BLOCKS] == names
    # Once a pass was seen, every unit was under way before it was asked for, the first one, too.
    assert ring.brought_late == BLOCKS + 1
    assert len(carrier.read) <= 3 * BLOCKS + 1
    assert ring.held <= 2 * max(sum(p.nbytes for p in b.parameters()) + 512 for b in model.blocks)


def test_buffers_of_what_rests_are_let_go(folder: Path) -> None:
    model, absences = absent(folder)
    ring = ring_of(model, absences, Recorder(), keep=False)
    held = []
    model.blocks[2].register_forward_hook(lambda *_: held.append(ring.held))
    model(inputs(0))
    assert held[0] > 0 and ring.held == 0


def test_many_threads_in_any_order(folder: Path) -> None:
    model, absences = absent(folder)
    ring_of(model, absences, Recorder(), keep=False)
    expected = whole(folder)
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for turn in range(20):
            x = inputs(seed + turn)
            number = order.randrange(BLOCKS + 1)
            if number == BLOCKS:
                same = torch.equal(model(x), expected(x))
            else:
                same = torch.equal(model.blocks[number](x), expected.blocks[number](x))
            if not same:
                wrong.append(f"{seed}.{turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_what_does_not_come_fails_that_pass_only(folder: Path) -> None:
    model, absences = absent(folder)
    carrier = Recorder()
    ring_of(model, absences, carrier)
    model(inputs(0))
    carrier.wrong = {"blocks.3"}
    for _ in range(2):
        with pytest.raises(EngineError, match="the disk is gone"):
            model(inputs(1))
    carrier.wrong = set()
    assert torch.equal(model(inputs(1)), whole(folder)(inputs(1)))


def test_a_pass_that_is_broken_off_leaves_nothing_behind(folder: Path) -> None:
    model, absences = absent(folder)
    ring = ring_of(model, absences, Recorder(), keep=False)

    def cancel(*_: object) -> None:
        raise InterruptedError

    handle = model.blocks[2][1].register_forward_pre_hook(cancel)
    with pytest.raises(InterruptedError):
        model(inputs(0))
    handle.remove()
    assert ring.held == 0
    assert torch.equal(model(inputs(1)), whole(folder)(inputs(1)))


def test_a_checkpoint_that_changes_is_noticed(folder: Path) -> None:
    model = offloaded(folder)
    model(inputs(0))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(EngineError, match="has changed while"):
        model(inputs(0))


def test_from_the_memory_of_the_host(folder: Path) -> None:
    """What a GPU is fed from."""
    model, absences = absent(folder)
    parts = split(absences.modules[0])
    host = FromHost(pinned=False)
    for unit in parts.rings[0]:
        host.take(unit)
    ring_around(model, parts, Reader(host))
    expected = whole(folder)
    (folder / "model.safetensors").unlink()
    for seed in range(3):
        assert torch.equal(model(inputs(seed)), expected(inputs(seed)))

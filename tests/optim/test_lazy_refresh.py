"""The option `lazy_overlap`: a basis that does not move is refreshed less often."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim import OPTIMIZERS, StepInBackward, slot
from hf_lowmem.optim.lowrank.projector import SubspaceProjector
from hf_lowmem.optim.state import DUE, OVERLAP, STRETCH, number
from tests.contracts.test_optimizers import same_bits

METHODS = ("galore", "fira", "natural_galore")
GAP = 3


def made(name: str, shape: tuple[int, ...] = (96, 64), **options: Any) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "rank": 8,
        "update_gap": GAP,
        "lazy_overlap": 0.9,
        "state": "8bit",
    } | options
    return OPTIMIZERS[name]([("p", p)], **settings), p


def fixed(p: nn.Parameter, step: int) -> Tensor:
    """A gradient of a clear subspace, and noise of each step beside it."""
    draw = torch.Generator().manual_seed(1)
    grad = torch.randn(*p.shape[:-1], 8, generator=draw) @ torch.randn(*p.shape[:-2], 8, p.shape[-1], generator=draw)
    return grad + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + step))


def noise(p: nn.Parameter, step: int) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + step))


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The updates, from 0, at which a basis was made."""
    found: list[int] = []
    find = SubspaceProjector.find

    def counted(self: Any, *args: Any) -> Tensor:
        found.append(self.step)
        return find(self, *args)

    monkeypatch.setattr(SubspaceProjector, "find", counted)
    return found


def stepped(optimizer: Any, p: nn.Parameter, steps: range, gradient: Any = fixed) -> None:
    for step in steps:
        p.grad = gradient(p, step)
        optimizer.step()


@pytest.mark.train
@pytest.mark.parametrize("basis", [None, "int4"])
@pytest.mark.parametrize("name", METHODS)
def test_a_subspace_that_stays_is_refreshed_less_and_less(name: str, basis: str | None, refreshed: list[int]) -> None:
    stepped(*made(name, basis=basis), range(100))
    assert refreshed == [step * GAP for step in (0, 1, 2, 4, 8, 16, 24, 32)]
    refreshed.clear()
    stepped(*made(name, lazy_overlap=None), range(100))
    assert refreshed == list(range(0, 100, GAP))


def test_a_subspace_that_moves_is_refreshed_as_ever(refreshed: list[int]) -> None:
    """Also once its intervals were long: one refresh that finds it elsewhere, and the next comes after one gap."""
    optimizer, p = made("galore")
    stepped(optimizer, p, range(20), noise)
    assert refreshed == list(range(0, 20, GAP))
    refreshed.clear()
    stepped(optimizer, p, range(20, 200))
    assert refreshed[-1] - refreshed[-2] == 8 * GAP
    refreshed.clear()
    stepped(optimizer, p, range(200, 260), noise)
    assert refreshed[2] - refreshed[1] == refreshed[3] - refreshed[2] == GAP


@pytest.mark.parametrize("shape", [(96, 64), (64, 256)], ids=str)
def test_noise_keeps_what_a_power_step_leaves_of_the_last_basis(shape: tuple[int, ...]) -> None:
    optimizer, p = made("galore", shape)
    found = []
    for step in range(30):
        stepped(optimizer, p, range(step, step + 1), noise)
        found.append(optimizer.state[p][OVERLAP].item())
    expected = max(shape) / sum(shape)
    assert sum(found[GAP::GAP]) / len(found[GAP::GAP]) == pytest.approx(expected, abs=0.1)


def test_fused_experts_and_a_missing_basis_keep_their_intervals(refreshed: list[int]) -> None:
    optimizer, p = made("galore", (3, 64, 32))
    stepped(optimizer, p, range(10))
    assert refreshed == list(range(0, 10, GAP))
    assert not {OVERLAP, DUE, STRETCH} & optimizer.state[p].keys()
    refreshed.clear()
    optimizer, p = made("galore")
    stepped(optimizer, p, range(10), lambda p, step: torch.zeros(p.shape))  # as a LoRA's A while B is zero
    assert number(optimizer.state[p][STRETCH]) == 1
    assert not optimizer.state[p][OVERLAP]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_gradient_when_a_basis_is_due_is_made_up_for(
    asynchronous: bool, refreshed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if asynchronous:
        monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    optimizer, p = made("galore")
    stepped(optimizer, p, range(60), lambda p, step: fixed(p, step) * (float("nan") if step == 12 else 1))
    assert any(12 < step < 60 for step in refreshed)
    assert p.isfinite().all()
    assert optimizer.skipped().steps == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_resumed_run_has_the_same_bits(name: str, cut: int) -> None:
    whole, p = made(name, basis="int4")
    stepped(whole, p, range(30))
    part, q = made(name, basis="int4")
    stepped(part, q, range(cut))
    buffer = io.BytesIO()
    torch.save(part.state_dict(), buffer)
    buffer.seek(0)
    again, r = made(name, basis="int4")
    r.data.copy_(q.data)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    stepped(again, r, range(cut, 30))
    assert torch.equal(p, r)
    assert same_bits(whole.state_dict(), again.state_dict())


def test_its_state_is_a_number_on_the_device_and_two_whole_ones() -> None:
    (lazy, p), (plain, q) = made("galore"), made("galore", lazy_overlap=None)
    stepped(lazy, p, range(2))
    stepped(plain, q, range(2))
    assert lazy.state[p].keys() - plain.state[q].keys() == {OVERLAP, DUE, STRETCH}
    assert lazy.state_bytes(p, lazy.param_groups[0]) == sum(t.nbytes for t in lazy.state[p].values())
    assert lazy.state[p][OVERLAP].shape == ()


def test_a_window_of_accumulation_makes_one_basis(refreshed: list[int]) -> None:
    optimizer, p = made("galore")
    last = False
    StepInBackward(optimizer, ready=lambda: last)
    for step in range(10):
        for micro in range(2):
            last = micro == 1
            (p * fixed(p, 2 * step + micro)).sum().backward()
        optimizer.step()
    assert refreshed == [0, GAP, 2 * GAP]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("galore", {"lazy_overlap": 1.5}, r"lazy_overlap=1.5: must be a finite number in \(0, 1\)"),
        ("fira", {"lazy_overlap": True}, "lazy_overlap=True: expected a number"),
        ("galore", {"projection": "random"}, "lazy_overlap=0.9 has no effect with projection='random'"),
        ("apollo", {}, "lazy_overlap=0.9 is not an option of name='apollo'"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        made(name, **options)

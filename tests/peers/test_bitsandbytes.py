"""AdamW and Lion with int8 states against bitsandbytes' AdamW8bit and Lion8bit, judged by fp32."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim.adamw import AdamW
from hf_lowmem.optim.lion import Lion
from hf_lowmem.optim.state import values_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes for this platform")

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}
STEPS = 100


class Pair(NamedTuple):
    """A method here and there, and how much further from the truth ours may be, rounded to nearest and at random."""

    ours: Any
    theirs: Any
    truth: Any  # in fp32; ours for Lion, which tests/peers/test_lion.py holds to lion-pytorch
    states: int
    allowance: float
    at_random: float


# AdamW: one part in a hundred for the order of arithmetic; where a second moment falls to zero in bitsandbytes and to
# the floor code here, ours is well under.
# Lion: an error of the state shows as a sign that differs now and then, 2 * lr at once. An rms error of 0.0194 of the
# way, whose rms is 0.087, is 0.7 such events a weight, 5400 in the smaller matrix; two thirds of them the two share. So
# the ratio of the errors has a standard deviation of sqrt(2 / 3) / (2 * sqrt(5400)) = 0.55 %; four are allowed.
# Codes at random cost Lion noise where bitsandbytes' codes do not stick yet: 3 to 6 % in these hundred steps.
METHODS = {
    "adamw": Pair(AdamW, bitsandbytes.optim.AdamW8bit, torch.optim.AdamW, 2, 1.01, 1.01),
    "lion": Pair(Lion, bitsandbytes.optim.Lion8bit, Lion, 1, 1.022, 1.08),
}


def gradient(shape: tuple[int, int], step: int, kind: str) -> Tensor:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grad = base + torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    if kind == "channels":  # three decades between columns, inside one block
        return grad * torch.logspace(-3, 0, shape[1])
    return grad


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps, by id, parameters that a Trainer wants stepped in fp32: ids of parameters long gone."""
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", None)


def rms(x: Tensor) -> float:
    return x.detach().double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("shape", [(64, 256), (100, 77)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "channels"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounded", ["nearest", "random"])
def test_agrees_with_bitsandbytes_and_is_no_further_from_the_truth(
    rounded: str, method: str, kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codec with theirs, code by code; then codes at random, as the optimizers have them."""
    pair = METHODS[method]
    if rounded == "nearest":
        states = {name: decl._replace(average=False) for name, decl in pair.ours.STATES.items()}
        monkeypatch.setattr(pair.ours, "STATES", states)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs_p, ours_p, truth_p = (nn.Parameter(start.clone()) for _ in range(3))
    theirs = pair.theirs([theirs_p], **SETTINGS)
    ours = pair.ours([ours_p], state="int8", **SETTINGS)
    truth = pair.truth([truth_p], **SETTINGS)
    for step in range(STEPS):
        for p, optimizer in ((theirs_p, theirs), (ours_p, ours), (truth_p, truth)):
            p.grad = gradient(shape, step, kind)
            optimizer.step()
    moved = rms(truth_p - start)
    their_error, our_error = rms(theirs_p - truth_p) / moved, rms(ours_p - truth_p) / moved
    between = rms(ours_p - theirs_p) / moved
    print(
        f"{method} {kind} {shape}: error of bitsandbytes {their_error:.4f}, ours {our_error:.4f}, between {between:.4f}"
    )
    assert our_error > 0
    allowance = pair.allowance if rounded == "nearest" else pair.at_random
    assert our_error <= allowance * their_error
    if kind == "normal":
        # Two roundings that share nothing lie sqrt(2) errors apart; the same codes but for a few, less than one.
        apart = their_error if rounded == "nearest" else 1.05 * (our_error**2 + their_error**2) ** 0.5
        assert between < apart


@pytest.mark.parametrize("method", METHODS)
def test_takes_no_more_bytes(method: str) -> None:
    pair = METHODS[method]
    theirs_p, ours_p = (nn.Parameter(torch.zeros(64, 256)) for _ in range(2))
    theirs = pair.theirs([theirs_p], **SETTINGS)
    ours = pair.ours([ours_p], state="int8", **SETTINGS)
    for p, optimizer in ((theirs_p, theirs), (ours_p, ours)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # bitsandbytes keeps a map of 256 fp32 for each state of each parameter.
    assert optimizer_bytes(ours) <= optimizer_bytes(theirs)
    moments = sum(v.nbytes for v in values_of(ours.state[ours_p]).values())
    assert moments == pair.states * (64 * 256 + 64 * 256 // 256 * 4)


@pytest.mark.parametrize("shape", [(31, 17), (4095,)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_where_neither_compresses(method: str, shape: tuple[int, ...]) -> None:
    """Below 4096 values both keep fp32 states: the rules themselves, over 100 steps with decay."""
    pair = METHODS[method]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs_p, ours_p = (nn.Parameter(start.clone()) for _ in range(2))
    theirs, ours = pair.theirs([theirs_p], **SETTINGS), pair.ours([ours_p], state="int8", **SETTINGS)
    for step in range(STEPS):
        for p, optimizer in ((theirs_p, theirs), (ours_p, ours)):
            p.grad = gradient((1, start.numel()), step, "normal").view(shape)
            optimizer.step()
    assert rms(ours_p - start) > 0.01
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5

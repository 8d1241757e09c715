"""AdamW with int8 states against bitsandbytes' AdamW8bit, judged by fp32."""

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS

bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes for this platform")

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
STEPS = 100


def gradient(shape: tuple[int, int], step: int, kind: str) -> Tensor:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grad = base + torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
    if kind == "channels":  # three decades between columns, inside one block
        return grad * torch.logspace(-3, 0, shape[1])
    return grad


def rms(x: Tensor) -> float:
    return x.detach().double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("shape", [(64, 256), (100, 77)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "channels"])
def test_agrees_with_bitsandbytes_and_is_no_further_from_the_truth(kind: str, shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs_p, ours_p, truth_p = (nn.Parameter(start.clone()) for _ in range(3))
    theirs = bitsandbytes.optim.AdamW8bit([theirs_p], **SETTINGS)
    ours = OPTIMIZERS["adamw"]([ours_p], state="int8", **SETTINGS)
    truth = torch.optim.AdamW([truth_p], **SETTINGS)
    for step in range(STEPS):
        for p, optimizer in ((theirs_p, theirs), (ours_p, ours), (truth_p, truth)):
            p.grad = gradient(shape, step, kind)
            optimizer.step()
    moved = rms(truth_p - start)
    their_error, our_error = rms(theirs_p - truth_p) / moved, rms(ours_p - truth_p) / moved
    between = rms(ours_p - theirs_p) / moved
    print(f"{kind} {shape}: error of bitsandbytes {their_error:.4f}, ours {our_error:.4f}, between {between:.4f}")
    assert our_error > 0
    # One part in a hundred for the order of arithmetic; where a second moment falls to zero in bitsandbytes and to the
    # floor code here, ours is well under.
    assert our_error <= 1.01 * their_error
    if kind == "normal":
        # Two roundings that share nothing would lie sqrt(2) errors apart; the same codes but for a few, less than one.
        assert between < their_error


def test_takes_no_more_bytes() -> None:
    theirs_p, ours_p = (nn.Parameter(torch.zeros(64, 256)) for _ in range(2))
    theirs = bitsandbytes.optim.AdamW8bit([theirs_p], **SETTINGS)
    ours = OPTIMIZERS["adamw"]([ours_p], state="int8", **SETTINGS)
    for p, optimizer in ((theirs_p, theirs), (ours_p, ours)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # bitsandbytes keeps two maps of 256 fp32 in each parameter's state; they are no more than two tables.
    assert optimizer_bytes(ours) <= optimizer_bytes(theirs)
    assert optimizer_bytes(ours) == 2 * (64 * 256 + 64 * 256 // 256 * 4)

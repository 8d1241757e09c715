"""AdamW with fp32 states against torch.optim.AdamW: the same bits."""

import pytest
import torch
from torch import nn

from hf_lowmem.optim import OPTIMIZERS


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(), (7,), (40, 24), (3, 20, 30)], ids=str)
def test_is_torch_s_adamw(shape: tuple[int, ...], weight_decay: float) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    theirs_p, ours_p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "weight_decay": weight_decay, "betas": (0.8, 0.95), "eps": 1e-7}
    theirs = torch.optim.AdamW([theirs_p], foreach=False, **settings)
    ours = OPTIMIZERS["adamw"]([ours_p], **settings)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 100) for o in (theirs, ours)]
    for step in range(100):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for p, optimizer, schedule in zip((theirs_p, ours_p), (theirs, ours), schedules, strict=True):
            p.grad = grad.clone()
            optimizer.step()
            schedule.step()
    assert (ours_p - start).abs().max() > 0.01, "the weights went somewhere"
    assert torch.equal(ours_p, theirs_p)

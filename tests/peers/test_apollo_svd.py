"""APOLLO with the exact projection, the authors' other variant, against their package."""

import pytest
from torch import nn

from hf_lowmem.optim import OPTIMIZERS
from tests.peers.gradients import SHAPES, STEPS, gradient, start

apollo_torch = pytest.importorskip("apollo_torch", reason="the authors' package: pip install 'hf-lowmem[test]'")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "rank", "scale"), [("apollo", 4, 2.5), ("apollo_mini", 1, 128.0)])
def test_agrees_with_the_authors(name: str, rank: int, scale: float, shape: tuple[int, int]) -> None:
    theirs_p, ours_p = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    common = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    group = {"params": [theirs_p], "rank": rank, "scale": scale, "update_proj_gap": 30, "proj_type": "std"}
    group |= {"proj": "svd", "scale_type": "channel" if name == "apollo" else "tensor"}
    theirs = apollo_torch.APOLLOAdamW([group], **common)
    ours = OPTIMIZERS[name]([ours_p], rank=rank, scale=scale, update_gap=30, projection="svd", **common)
    for step in range(STEPS):
        theirs_p.grad, ours_p.grad = gradient(shape, step), gradient(shape, step)
        theirs.step()
        ours.step()
    assert (ours_p - start(shape)).abs().max().item() > 0.05, "the weights went somewhere"
    assert (ours_p - theirs_p).abs().max().item() <= 1e-5

"""Whoever reads a weight that is at rest is told its name, and who asks what does not depend on values is answered."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lowmem.optim import make_optimizer
from hf_lowmem.weights import resting
from tests.weights.test_rest import BF16, llama

READS: dict[str, Callable[[nn.Parameter, Any], Any]] = {
    "add": lambda p, m: p + 1,
    "linear": lambda p, m: nn.functional.linear(torch.ones(1, p.shape[1], dtype=p.dtype), p),
    "data": lambda p, m: p.data,
    "detach": lambda p, m: p.detach(),
    "in place": lambda p, m: torch.no_grad()(p.mul_)(2),
    "item": lambda p, m: p[0, 0],
    "numpy": lambda p, m: p.float().numpy(),
    "clone": lambda p, m: p.clone(),
    "norm": lambda p, m: torch.linalg.vector_norm(p),
    "foreach": lambda p, m: torch._foreach_norm([p]),
    "pointer": lambda p, m: p.data_ptr(),
    "another dtype": lambda p, m: m.float(),
    "a copy of the parameter": lambda p, m: copy.deepcopy(p),
    "a copy of the model": lambda p, m: copy.deepcopy(m),
    "pickle": lambda p, m: pickle.dumps(m),
    "an average": lambda p, m: torch.optim.swa_utils.AveragedModel(m),
    "another's values": lambda p, m: nn.init.normal_(p),
    "to another device, alone": lambda p, m: p.to("meta"),
    "setting data": lambda p, m: setattr(p, "data", torch.zeros(p.shape, dtype=p.dtype)),
    "an average by hand": lambda p, m: [torch.no_grad()(torch.zeros(q.shape).lerp_)(q, 0.1) for q in m.parameters()],
    "a merge": lambda p, m: p.data.add_(torch.ones(p.shape, dtype=p.dtype)),
    "another vocabulary": lambda p, m: m.resize_token_embeddings(len(p) + 8),
    "a head that is tied to it": lambda p, m: (setattr(m.lm_head, "weight", p), m(torch.ones(1, 4, dtype=torch.int))),
    "shards of FSDP2": lambda p, m: fully_shard(m.model.embed_tokens),
    "replicas of DDP": lambda p, m: DistributedDataParallel(m),
    "another optimizer": lambda p, m: (setattr(p, "grad", torch.ones_like(p)), torch.optim.AdamW([p]).step()),
}


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A group of one process, for what shards and copies a model."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_a_weight_is_told_its_name(read: str, alone: None) -> None:
    model = llama()
    make_optimizer("adamw", model, weights="int8_sr")
    p = model.model.embed_tokens.weight
    before = [t.clone() for t in resting(model)["model.embed_tokens.weight"].stored()]
    with pytest.raises(RuntimeError, match=r"model.embed_tokens.weight is at rest in int8.*weights\.wake\(model\)"):
        READS[read](p, model)
    after = resting(model)["model.embed_tokens.weight"].stored()
    assert all(map(torch.equal, before, after))


def test_who_gets_by_the_guard_gets_nan() -> None:
    model = llama()
    make_optimizer("adamw", model, weights="int8_sr")
    p = model.model.layers[0].mlp.up_proj.weight
    with torch._C.DisableTorchFunctionSubclass():
        assert p.float().isnan().all()
        assert p.untyped_storage().nbytes() == 2


def test_what_does_not_depend_on_values_is_answered() -> None:
    model = llama()
    before = sum(p.numel() for p in model.parameters())
    make_optimizer("adamw", model, weights="int8_sr")
    p = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(p, nn.Parameter)
    assert (p.shape, p.dtype, p.device.type, p.requires_grad, p.is_leaf) == ((96, 64), BF16, "cpu", True, True)
    assert model.num_parameters() == before == sum(p.numel() for p in model.parameters())
    assert "at rest in int8" in repr(p)
    assert model.to("cpu").to(BF16).bfloat16().cpu().train() is model
    assert model.dtype == BF16
    model.zero_grad()
    p.requires_grad_(False).requires_grad_(True)

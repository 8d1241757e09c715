"""Converted models under DDP and FSDP2, two processes over gloo: gradients are those of the plain model."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_lowmem.activations import OwnedTiers, convert, ends
from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul.sampled import OwnedSamples
from hf_lowmem.specs import STREAMED, ActivationSpec
from tests.activations.models import batch, build
from tests.dist.imported import run_module


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the second of two passes, when sharded weights have been freed and gathered again."""
    rank = dist.get_rank()
    mine = {name: tensor[rank : rank + 1] for name, tensor in batch().items()}
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(**mine, use_cache=False).loss.backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def sharded(model: nn.Module, mixed: bool, parts: bool = False) -> nn.Module:
    """parts: a layer's MLP and attention are gathered each by itself, so a layer runs when some of it is in shards."""
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if mixed else None)
    for layer in model.get_submodule("model.layers").children():
        for part in (layer.get_submodule("mlp"), layer.get_submodule("self_attn")) if parts else ():
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": lambda m: sharded(m, mixed=False),
    "fsdp2-bf16": lambda m: sharded(m, mixed=True),
    "fsdp2-parts": lambda m: sharded(m, mixed=False, parts=True),
}


def check(wrap: str, when: str, tier: str) -> None:
    if tier in (LONG, SAMPLE):
        (check_long if tier == LONG else check_sample)(wrap)
        return
    plain, ours, wrappers = build("llama"), build("llama"), WRAPPERS
    expected = gradients(wrappers[wrap](copy.deepcopy(plain)))
    streams, shares = tier.startswith(STREAMED), "/" in tier
    spec = ActivationSpec(tiers=tier, chunk=7 if streams else None)
    if shares:  # an input that is made again is the one that would have been kept
        alone = copy.deepcopy(ours)
        convert(alone, ActivationSpec(tiers=tier.partition("/")[0], chunk=7))
        expected = gradients(wrappers[wrap](alone))
    if when == "before":
        convert(ours, spec)
    wrapped = wrappers[wrap](ours)
    if when == "after":
        convert(wrapped, spec)
    if wrap == "fsdp2-parts" and streams:
        with pytest.raises(ValueError, match=r"weights that are in shards.*Shard whole layers"):
            gradients(wrapped)
        return
    found = gradients(wrapped)
    assert found.keys() == expected.keys()
    unequal = [n for n, g in expected.items() if not torch.equal(g, found[n])]
    assert bool(unequal) == (tier not in ("exact", "stream/2")), unequal
    # tests/activations/test_lossy.py derives 0.15; here it tells a rounded gradient from a wrong one.
    bound = 1e-5 if (wrap, tier) == ("fsdp2", "stream") else 0.15
    assert max(((found[n] - g).norm() / g.norm()).item() for n, g in expected.items()) < bound


LONG = "a long sequence's"


def check_long(wrap: str) -> None:
    """The last norm in tiles, and inputs in host memory, change no gradient but that norm's, a sum over tiles."""
    found = []
    for tile, offload in ((2**20, None), (5, "inputs")):
        ends.TILE = tile
        model = build("llama")
        OwnedTiers(model, ActivationSpec(tiers="checkpoint_fp8", offload=offload), "a test")
        found.append(gradients(WRAPPERS[wrap](model)))
    for name, grad in found[0].items():
        if name == "model.norm.weight":
            torch.testing.assert_close(found[1][name], grad, rtol=2.0**-7, atol=2.0**-9)
        else:
            assert torch.equal(found[1][name], grad), name


SAMPLE = "a sample of the rows"


def check_sample(wrap: str) -> None:
    """Each process draws rows of its own input, as it would alone; gradients are averaged as ever."""
    alone, ours, plain = build("llama"), build("llama"), build("llama")
    for model in (alone, ours):
        OwnedSamples(linears_of_layers(model), 0.5, seed=0)
    found, exact = gradients(WRAPPERS[wrap](ours)), gradients(WRAPPERS[wrap](plain))
    expected = gradients(alone)
    for grad in expected.values():
        dist.all_reduce(grad)
    assert found.keys() == expected.keys()
    assert max(((found[n] - g / 2).norm() / g.norm()).item() for n, g in expected.items()) < 1e-6
    assert not all(torch.equal(found[n], g) for n, g in exact.items())


CASES = [
    ("ddp", "before", SAMPLE),
    ("fsdp2", "before", SAMPLE),
    ("ddp", "before", "exact"),
    ("ddp", "before", "fp8"),
    ("ddp", "before", "checkpoint_fp8"),
    ("fsdp2", "before", "exact"),
    ("fsdp2", "after", "exact"),
    ("fsdp2", "after", "fp8_recompute"),
    ("fsdp2", "after", "checkpoint_fp8"),
    ("fsdp2-parts", "after", "exact"),
    ("fsdp2-parts", "after", "fp8_recompute"),
    ("fsdp2-parts", "after", "checkpoint_fp8"),
    ("fsdp2-bf16", "after", "exact"),
    ("fsdp2-bf16", "after", "fp8"),
    ("ddp", "before", LONG),
    ("fsdp2", "before", LONG),
    ("fsdp2-bf16", "before", LONG),
    ("ddp", "before", "stream_fp8"),
    ("fsdp2", "before", "stream"),
    ("fsdp2", "after", "stream"),
    ("fsdp2-bf16", "after", "stream"),
    ("fsdp2-parts", "after", "stream_fp8"),
    ("ddp", "before", "stream_fp8/2"),
    ("fsdp2", "before", "stream/2"),
    ("fsdp2", "after", "stream/2"),
    ("fsdp2-bf16", "after", "stream_fp8/2"),
]


@pytest.mark.train
@pytest.mark.dist
def test_ddp_and_fsdp2() -> None:
    done = run_module("tests.dist.start", ["2", __name__])
    # gloo may end a process with "terminate called without an active exception" after everything has passed
    assert all(f"passed {' '.join(case)}" in done.stdout for case in CASES), done.stdout + done.stderr[-4000:]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in CASES:
        check(*case)
        if dist.get_rank() == 0:
            print("passed", *case, flush=True)
    dist.destroy_process_group()

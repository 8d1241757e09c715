"""Bytes that each process sends in a step, counted at torch.distributed's collectives."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lowmem.optim import make_optimizer

RANK, M, N = 16, 256, 688  # r/m = 1/16
METHODS = ("adamw", "lion", "lamb", "apollo", "apollo_mini", "galore", "fira", "natural_galore")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(M, M, bias=False)
        self.up = nn.Linear(M, N, bias=False)  # its weight is (N, M): m >= n
        self.down = nn.Linear(N, M, bias=False)  # (M, N): m < n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.square(x)).tanh())


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes a process sends: of a sum over W processes 2 (W - 1) / W of its size, of a half of it (W - 1) / W."""
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    sent: Counter[str] = Counter()

    def watch(name: str, size: Callable[..., float]) -> Callable[[], None]:
        plain = getattr(dist, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            sent[name] += round(share * size(*(t.nbytes for t in tensors)))
            return plain(*args, **kwargs)

        setattr(dist, name, run)
        return lambda: setattr(dist, name, plain)

    halves = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single")
    undo = [watch("all_reduce", lambda one: 2 * one)]
    undo += [
        watch(name, max) for name in halves if hasattr(dist, name)
    ]  # FSDP2 uses the latter two where torch has them
    try:
        yield sent
    finally:
        for back in undo:
            back()


def measure(name: str) -> dict[str, dict[str, int]]:
    """Of the forward and backward passes, of an ordinary step, and of one that makes a new basis."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    rank: dict[str, Any] = {"rank": 1 if name == "apollo_mini" else RANK} if name in METHODS[3:] else {}
    optimizer = make_optimizer(name, model, lr=1e-3, **rank)
    found: dict[str, dict[str, int]] = {}
    for step in range(3):
        with counted() as sent:
            model(torch.randn(4, M)).square().mean().backward()
        found["passes"] = dict(sent)
        with counted() as sent:
            optimizer.step()
        found["first" if step == 0 else "step"] = dict(sent)
        optimizer.zero_grad()
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for method in sys.argv[1].split(",") if len(sys.argv) > 1 else METHODS:
        result = measure(method)
        if dist.get_rank() == 0:
            print("passed", method, json.dumps(result), flush=True)
    if dist.get_rank() == 0:
        print("passed all", flush=True)
    dist.barrier()
    dist.destroy_process_group()

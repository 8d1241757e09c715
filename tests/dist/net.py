"""A model of every kind of parameter, its gradients on any number of processes, and what the workers share."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_lowmem.distributed import Shards, is_sharded, local
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, make_optimizer
from hf_lowmem.optim.state import values_of


class Attention(nn.Module):
    """A projection to queries of which shards cut a head in two."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.q_proj = 10, nn.Linear(64, 70, bias=False)


class Net(nn.Module):
    """Tall, wide and square matrices, rows that are a multiple of every block and not, fewer rows than processes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall = nn.Linear(256, 272)  # rows of 256: the blocks are those of the flattened tensor
        vars(self.tall)["split_sizes"] = (136, 136)  # two matrices in one
        self.wide = nn.Linear(256, 40, bias=False)  # m < n: the projected dimension is the one that is cut
        self.odd = nn.Linear(70, 67, bias=False)  # neither rows nor blocks are even
        self.one = nn.Linear(5000, 1, bias=False)  # one row: the other processes have none
        self.norm = nn.LayerNorm(4100)
        self.experts, self.num_experts = nn.Parameter(torch.randn(3, 40, 48)), 3
        self.attention = Attention()
        self.words, self.head = nn.Embedding(71, 64), nn.Linear(64, 69, bias=False)
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, seed: int) -> Tensor:
        """A quadratic with its minimum elsewhere than at the parameters."""
        total = torch.zeros(())
        for name, p in self.named_parameters():
            total = total + (p.float() - target(name, p.shape, seed)).pow(2).sum()
        return total


def target(name: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha1(f"{name}{seed}".encode()).digest()[:6], "big")
    )
    columns = torch.logspace(0, -2, shape[-1])  # gradients with directions of their own, as those of a model have
    return 3 * torch.randn(shape, generator=generator) * columns


def options(name: str) -> dict[str, Any]:
    defaults = OPTIMIZERS[name].DEFAULTS
    return {k: v for k, v in {"rank": 16, "update_gap": 7}.items() if defaults.get(k, 0) > v}


def make(name: str, codec: str, model: nn.Module, **kwargs: Any) -> LowMemOptimizer:
    """`name`: of a method, perhaps with the rule of embedding and head, or cautious: "apollo_mini+scale"."""
    name, _, more = name.partition("+")
    options_of: dict[str, dict[str, Any]] = {"cautious": {"cautious": True}, "sinkgd": {"sinkhorn_iters": 5}}
    own = options_of.get(more, {"embeddings": more or None})
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1} | own | options(name) | kwargs
    return make_optimizer(name, model, state=codec, **settings)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def wrap(kind: str, model: nn.Module) -> nn.Module:
    return sharded(model) if kind == "fsdp2" else DistributedDataParallel(model)


def train(model: nn.Module, optimizer: LowMemOptimizer, steps: Iterable[int]) -> None:
    """Each process has another gradient, and the engine averages them."""
    for step in steps:
        optimizer.zero_grad()
        model(2 * step + dist.get_rank()).backward()
        optimizer.step()


def train_alone(model: nn.Module, optimizer: LowMemOptimizer, steps: Iterable[int]) -> None:
    """What two processes do, in one: the same bits, as a sum of two numbers has no order and halving is exact."""
    for step in steps:
        optimizer.zero_grad()
        ((model(2 * step) + model(2 * step + 1)) / 2).backward()
        optimizer.step()


def train_by_rows(model: nn.Module, optimizer: LowMemOptimizer, steps: Iterable[int]) -> None:
    """The same gradients on any number of processes, given to the shards themselves."""
    for step in steps:
        with torch.no_grad():
            for name, p in model.named_parameters():
                goal = target(name, p.shape, step)
                if is_sharded(p):
                    home = Shards(p)  # type: ignore[arg-type]
                    p.grad = home.wrap(2 * (local(p) - home.rows(goal)), p.shape[0])
                else:
                    p.grad = 2 * (p - goal)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, on every process."""
    whole = {}
    for name, p in model.named_parameters():
        whole[name.removeprefix("module.")] = (p.full_tensor() if is_sharded(p) else p).detach().clone()  # type: ignore[attr-defined]
    return whole


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ."""
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]


def apart(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """Distance of `a` from `b`, for each weight, as a part of the way from `start` to `b`."""
    return {k: ((a[k] - b[k]).float().norm() / (b[k] - start[k]).float().norm()).item() for k in a}


def equal_on_all(values: Iterable[Tensor]) -> bool:
    """Whether every process has these bits."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, digest.hexdigest())
    return len(set(every)) == 1


def replicated(optimizer: LowMemOptimizer) -> list[Tensor]:
    """State that every process has whole: all of it under DDP, bases and norms of matrices under FSDP2."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            values = values_of(optimizer.state.get(p, {}))
            found += [v.detach() for _, v in sorted(values.items()) if not is_sharded(v)]
    return found

"""Weights at rest that FSDP2 has cut: each process keeps the codes of its rows, and codes are what is gathered.

FSDP2 asks the shard of a parameter what to send and what to make of what comes (`fsdp_pre_all_gather` and
`fsdp_post_all_gather`, by which torchao gathers float8). Here a shard sends its codes and scales, 1.03 bytes a weight,
and the layer gets the bf16 weight that FSDP2 gives it anyway and takes back when the layer has run. So layers run as
plain layers, and the rules by which they run are FSDP2's own; what it keeps between two uses is codes alone.

A DTensor's operators work on its shard, and of its shard this one allows what FSDP2, checkpoints and optimizers ask of
a tensor without values. Whoever asks for values gets an error with the weight's name.

Rows that are not shared evenly FSDP2 would want padded, codes and scales to one shape, so such weights stay in bf16.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from hf_lowmem.distributed import Shards, held, hold, is_sharded
from hf_lowmem.weights import int8
from hf_lowmem.weights.rest import AtRest, at_rest, load, refuse

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

__all__ = ["managed", "put_shard", "refused_setting", "sharded_parameters", "wake_shard", "why_whole"]

WAKE = "model.state_dict() has bf16 copies of the shards, and hf_lowmem.weights.wake(model) makes them plain bf16 again"
aten = torch.ops.aten
VIEWS = {aten.detach.default, aten.alias.default, aten.view.default, aten._unsafe_view.default}
LIKE = {
    getattr(aten, name).default
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
} | {getattr(aten, name).default for name in ("new_zeros", "new_ones", "new_empty", "new_full")}


class ShardAtRest(Tensor):
    """The local tensor of a DTensor parameter that is at rest: a shape, and codes."""

    lowmem_at_rest: AtRest

    @staticmethod
    def __new__(cls, kept: AtRest, shape: torch.Size | None = None) -> "ShardAtRest":
        made = Tensor._make_wrapper_subclass(
            cls, kept.shape if shape is None else shape, dtype=kept.dtype, device=kept.codes.device, storage_size=0
        )
        made.lowmem_at_rest = kept
        # An address of its own: accelerate tells parameters by it, those of a model that it has prepared before.
        vars(made)["data_ptr"] = kept.codes.data_ptr
        return made

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        shard, *others = args
        if isinstance(shard, ShardAtRest):
            kept = shard.lowmem_at_rest
            plain = torch.empty((), dtype=shard.dtype, device=shard.device).expand(shard.shape)
            if func in VIEWS:
                return ShardAtRest(kept, func(torch.empty(shard.shape, device="meta"), *others).shape)
            if func in LIKE:
                return func(plain, *others, **(kwargs or {}))
            if func is aten.copy_.default and isinstance(values := others[0], Tensor):
                if at_rest(values) is kept:  # torch's loading of whole checkpoints has written them, and does it again
                    return shard
                if at_rest(values) is None:
                    load(kept, shard, values)
                    return shard
        return refuse(next(_in((args, kwargs))), str(func), WAKE)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.lowmem_at_rest.name}: {self.dtype} {tuple(self.shape)} of this process, at rest in int8"

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse(self.lowmem_at_rest, "copy.deepcopy", WAKE)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse(self.lowmem_at_rest, "pickle", WAKE)

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: object,
    ) -> tuple[tuple[Tensor, ...], None]:
        """Hand FSDP2 what it sends: codes and scales, a row of each for a row of the weight."""
        kept = self.lowmem_at_rest
        sent = kept.codes.view(len(self), -1), kept.scale.view(len(self), -1)
        if mesh.size() == 1:  # where nothing is sent, FSDP2 hands on one tensor alone
            sent = (torch.cat([sent[0], sent[1].view(torch.int8)], dim=1),)
        return sent, None

    @torch.no_grad()
    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: object, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """Make of what all have sent the weight, which it frees and fills again from then on."""
        kept = self.lowmem_at_rest
        codes, scale = gathered if len(gathered) == 2 else gathered[0].tensor_split([kept.shape[1]], dim=1)
        codes, scale = codes.contiguous(), scale.contiguous().view(torch.float32)
        shape = codes.shape
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=codes.device)
            found = out, (out,)
        else:
            found = None
        with torch.autograd._unsafe_preserve_version_counter(out):
            whole = out if dtype == kept.dtype else None
            whole = int8.decode(codes.view(-1), scale.view(-1), shape, kept.dtype, group=kept.group, out=whole)
            if whole is not out:
                out.copy_(whole)
        for part in gathered:  # FSDP2 would keep them as long as the weight
            part.untyped_storage().resize_(0)
        return found


def _in(value: object) -> Iterator[AtRest]:
    """Find what is at rest among the arguments of a call, however deep."""
    if isinstance(value, ShardAtRest):
        yield value.lowmem_at_rest
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _in(item)


def managed(model: nn.Module) -> "dict[int, FSDPParam]":
    """Records that FSDP2 keeps of its parameters, by `id` of the sharded one; whole ones are given back first."""
    found: dict[int, FSDPParam] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        for value in vars(module._get_fsdp_state()).values():  # a group of parameters; since torch 2.13 a list of such
            for group in value if isinstance(value, list) else [value]:
                found |= {id(known.sharded_param): known for known in getattr(group, "fsdp_params", ())}
    return found


def sharded_parameters(model: nn.Module) -> list[Tensor]:
    """Parameters that FSDP2 has cut, also those that it has gathered for the time being."""
    return [known.sharded_param for known in managed(model).values()]


def why_whole(p: nn.Parameter, known: "FSDPParam | None") -> str | None:
    """Why codes of a parameter cannot be gathered, as the rest of "... stay in bf16: "; None: they can."""
    if known is None or not is_sharded(p):
        return "not cut by FSDP2 as the rest of the model is"
    if known.is_dtensor:
        return "cut by tensor parallelism, too"
    parts = Shards(p).parts
    return f"rows that {parts} processes cannot share evenly" if len(p) % parts else None


def refused_setting(known: "FSDPParam") -> str | None:
    """Setting of FSDP2 that does not go with codes, as its user knows it; None: there is none."""
    if known.offload_to_cpu:
        return "CPUOffloadPolicy (cpu_offload)"
    after = known.post_forward_mesh_info
    if after is not None and after != known.mesh_info:
        return "reshard_after_forward=(a number of processes)"
    return None


def put_shard(name: str, p: nn.Parameter, known: "FSDPParam", scale: Tensor | None) -> AtRest:
    """Put the shard of a parameter to rest; its bf16 is gone when this returns.

    Args:
        known: what FSDP2 knows of it.
        scale: the whole weight's, where they may be known.
    """
    assert is_sharded(p)
    kept = AtRest(name, held(p).detach(), scale, Shards(p))
    _exchange(p, known, ShardAtRest(kept), torch.empty(0, dtype=p.dtype, device=p.device))
    return kept


def wake_shard(p: Tensor, known: "FSDPParam") -> None:
    """Make a plain shard of one that is at rest."""
    kept = at_rest(p)
    assert kept is not None
    values = kept.decode()
    _exchange(p, known, values, values.view(-1))


def _exchange(p: Tensor, known: "FSDPParam", shard: Tensor, flat: Tensor) -> None:
    """Give a parameter another shard, and have FSDP2 forget what it has of the one before.

    Args:
        flat: what FSDP2 gathers where a shard says nothing of its own.
    """
    hold(p, shard)
    known._sharded_param_data = flat
    known.all_gather_outputs = []
    vars(known).pop("_unsharded_param", None)  # made again by the next gathering
    known._init_extensions()

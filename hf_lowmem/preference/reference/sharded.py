"""A reference that FSDP cuts: every process keeps a part of what process 0 has loaded.

Under `fsdp_cpu_ram_efficient_loading` transformers 5.17 has weights on the first process of a machine, and zeros on the
others. accelerate gives a policy the first one's weights before it cuts it. TRL cuts a reference as each process has
it, so that a part of it would be zeros, and every log-probability wrong without a word.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from trl.trainer import dpo_trainer

__all__ = ["prepare_fsdp"]

_cut = dpo_trainer.prepare_fsdp


def prepare_fsdp(model: nn.Module, accelerator: Accelerator) -> object:
    """TRL's, of a model that has the weights of process 0 everywhere."""
    take_from_first(model, accelerator.device)
    return _cut(model, accelerator)


@torch.no_grad()
def take_from_first(model: nn.Module, device: torch.device) -> None:
    """Copy parameters and buffers of process 0 to all others, one after the other by way of `device`.

    Raises:
        ValueError: for weights that are on the meta device, where nothing can be copied to.
    """
    values: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, x in values if x.is_meta]:
        raise ValueError(
            f"the reference model's {empty[0]!r} is on the meta device, so this process has no weights of it. Set "
            "fsdp_cpu_ram_efficient_loading: false."
        )
    for _, x in values:
        if hasattr(x, "device_mesh"):  # cut already
            continue
        whole = x.detach().to(device)
        dist.broadcast(whole, src=0)
        x.copy_(whole)

"""For tests alone: FSDP2 over gloo through accelerate, which makes DDP of FSDP on a CPU without a word."""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain_init = AcceleratorState.__init__


def init_with_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
    """As accelerate's own, and then what it does where there are GPUs."""
    plain_init(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


def allow() -> None:
    """From here on, FSDP on a CPU is FSDP."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState.__init__ = init_with_fsdp  # type: ignore[method-assign]

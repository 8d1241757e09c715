"""The field of `LowMemArguments` that concerns host memory."""

from dataclasses import dataclass, field

from hf_lowmem.specs import OFFLOADS, check_choice

__all__ = ["HostArguments"]


@dataclass
class HostArguments:
    """See `LowMemArguments`, of which this is a part."""

    lowmem_offload: str | None = field(
        default=None,
        metadata={
            "help": "What waits in host memory. inputs: what checkpoint_fp8 or stream keeps of a layer. weights: those "
            "of the layers, one of which comes to the device at a time; with an optim of forward passes alone that "
            "keeps no state (mezo, zo_sign, zo_conservative, fzoo), in one process. Default: nothing."
        },
    )

    def lowmem_offloaded(self) -> str | None:
        """The name of what waits in host memory, checked; None for nothing."""
        if self.lowmem_offload is not None:
            check_choice("lowmem_offload", self.lowmem_offload, OFFLOADS)
        return self.lowmem_offload

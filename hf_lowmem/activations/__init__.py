"""Tiers: a layer keeps fewer bytes for its backward pass.

formats      how one tensor is stored: as it is, as E4M3, as int8
values       what backward asks for, and how it is had: kept, or computed again
tape         which tensors of a layer's call are the same, and which can be computed from others
blocks       the forwards of a converted layer
detect       which modules of a model are what
fusable      which of them a kernel can stand in for
convert      from a tier to forwards, and back
owned        tiers for as long as a training lasts
checkpoint   tier `checkpoint_fp8`
host         inputs of layers in host memory
ends         norms beside the layers, in tiles of tokens
streaming    tiers `stream` and `stream_fp8`
hooks        tier `hooks_fp8`
seeds        of stochastic rounding, which leave torch's generator alone
beside       tiers beside the checkpointing that they switch off
report       what was handled, and bytes per token, counted
"""

from hf_lowmem.activations.beside import kept_beside_inputs
from hf_lowmem.activations.convert import at_step, convert, undo
from hf_lowmem.activations.formats import compress, decompress
from hf_lowmem.activations.owned import OwnedTiers, owners_of, rehearsal
from hf_lowmem.activations.report import LayerReport, Measured, Report, measure

__all__ = [
    "LayerReport",
    "Measured",
    "OwnedTiers",
    "Report",
    "at_step",
    "compress",
    "convert",
    "decompress",
    "kept_beside_inputs",
    "measure",
    "owners_of",
    "rehearsal",
    "undo",
]

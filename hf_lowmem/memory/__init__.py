"""Memory of a training step, counted in bytes.

Beside the weights, three things live in a step's memory: what the forward pass saves for the backward pass, the
gradients, and the optimizer's state. All three can be counted exactly and on any device, because each is a set of
tensors and a tensor names its storage. So everything here counts *storages*: a tensor saved twice, or a tensor and a
view of it, is one storage; a slice keeps the whole storage alive, and the whole of it counts.

    count   parameters, gradients, optimizer state: sets of tensors that somebody holds and can be asked for
    saved   what autograd keeps for the backward pass, per module
    peak    the sum of everything at its highest, from the allocator or the operating system
    free    what a device has left
    units   amounts as people write them

It needs torch alone. It measures; it never prints, and never changes a result.
"""

from hf_lowmem.memory.count import gradient_bytes, human_bytes, optimizer_bytes, parameter_bytes
from hf_lowmem.memory.peak import PeakMemory, measure_peak
from hf_lowmem.memory.saved import SavedReport, measure_saved

__all__ = [
    "PeakMemory",
    "SavedReport",
    "gradient_bytes",
    "human_bytes",
    "measure_peak",
    "measure_saved",
    "optimizer_bytes",
    "parameter_bytes",
]

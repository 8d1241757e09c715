"""Methods that need forward passes alone. `ZEROTH` is their part of the table of methods."""

from hf_lowmem.optim.zeroth.conservative import ZoConservative
from hf_lowmem.optim.zeroth.estimate import ZerothOrder
from hf_lowmem.optim.zeroth.fzoo import Fzoo
from hf_lowmem.optim.zeroth.offload import bring_back, host_layers_of, put_in_host
from hf_lowmem.optim.zeroth.rules import Mezo, ZoAdam, ZoAdamM, ZoMomentum, ZoSign

__all__ = [
    "ZEROTH",
    "Fzoo",
    "Mezo",
    "ZerothOrder",
    "ZoAdam",
    "ZoAdamM",
    "ZoConservative",
    "ZoMomentum",
    "ZoSign",
    "bring_back",
    "host_layers_of",
    "put_in_host",
]

ZEROTH: dict[str, type[ZerothOrder]] = {
    cls.name: cls for cls in (Mezo, ZoSign, ZoMomentum, ZoAdam, ZoAdamM, ZoConservative, Fzoo)
}

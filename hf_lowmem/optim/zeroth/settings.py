"""Options that all methods of zeroth order have, and their checks."""

from hf_lowmem.optim.state import Group
from hf_lowmem.specs import check_integer, check_number

__all__ = ["COMMON", "PROBING", "check_perturbation", "check_probes"]

LEAST_SHARE = 2**-16  # a choice has 16 bits


def check_perturbation(label: str, value: object) -> None:
    """Raise unless a perturbation is a number above 0."""
    check_number(label, value, low=0.0, low_open=True)


def check_probes(label: str, value: object) -> None:
    """Raise unless there is a direction at least."""
    check_integer(label, value, low=1)


def check_share(label: str, value: object) -> None:
    """Raise unless a share is None, or a number of at least LEAST_SHARE and below 1."""
    if value is not None:
        check_number(label, value, low=LEAST_SHARE, high=1.0)


def check_layers(label: str, value: object) -> None:
    """Raise unless a number of layers is None, or 1 at least."""
    if value is not None:
        check_integer(label, value, low=1)


# Options of every method, and their checks.
PROBING = {
    "perturbation": check_perturbation,
    "probes": check_probes,
    "share": check_share,
    "block_layers": check_layers,
}
COMMON: Group = {"perturbation": 1e-3, "probes": 1, "share": None, "block_layers": None}

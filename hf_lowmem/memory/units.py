"""Amounts of memory as people write them, into bytes: the way back from `human_bytes`."""

import math
import re
from typing import Any

__all__ = ["parse_bytes"]

UNITS = {
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_AMOUNT = re.compile(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?|[-+]?inf|nan)\s*(\S*)\s*", re.IGNORECASE)


def parse_bytes(label: str, value: Any) -> int:
    """An amount with its unit, such as "24GiB" (2**30 bytes each), "24GB" (10**9) or "23.5 GiB", in whole bytes.

    Raises:
        TypeError: for what is no text: a bare number does not say its unit.
        ValueError: for another form, an unknown unit, and what is not above zero; the message begins with `label`.
    """
    if not isinstance(value, str):
        raise TypeError(f"{label}={value!r}: expected text with a unit, such as '24GiB', got {type(value).__name__}.")
    match = _AMOUNT.fullmatch(value)
    try:
        number = float(match[1]) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise ValueError(f"{label}={value!r} is no amount of memory. Write a number and a unit, such as '24GiB'.")
    unit = match[2]
    if unit not in UNITS:
        known = ", ".join(UNITS)
        what = f"the unit {unit!r} is not known" if unit else "the unit is missing"
        raise ValueError(f"{label}={value!r}: {what}. Choose from: {known}; GiB is 2**30 bytes, GB is 10**9.")
    if not math.isfinite(number) or int(number * UNITS[unit]) <= 0:
        raise ValueError(f"{label}={value!r}: must be a finite amount above zero. Give what one device may hold.")
    return int(number * UNITS[unit])

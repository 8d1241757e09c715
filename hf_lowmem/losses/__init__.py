"""Losses as plain functions of log-probabilities, and the one table that names them.

A new preference loss is one file with one function, one test of what is special about it, and one line in
`PREFERENCE_LOSSES`; the contract suite, the trainer and the command line read the table. There is no SFT loss
here: TRL's own, through its fused head, is used as it is. A second copy would drift from it.
"""

from difflib import get_close_matches

from hf_lowmem.losses.asft import asft
from hf_lowmem.losses.logps import PairLogps, PreferenceLoss, log1mexp, log_odds, pair_logps, preference_loss

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {"asft": asft}


def get_preference_loss(name: str) -> PreferenceLoss:
    """The loss of that name. ValueError, with the nearest names, if the table has none.

    TRL's own loss types ("sigmoid", "ipo", ...) are not in the table: TRL computes them.
    """
    if name not in PREFERENCE_LOSSES:
        near = get_close_matches(name, PREFERENCE_LOSSES) or sorted(PREFERENCE_LOSSES)
        raise ValueError(f"{name!r} is no preference loss of hf_lowmem. Nearest: {', '.join(near)}.")
    return PREFERENCE_LOSSES[name]


__all__ = [
    "PREFERENCE_LOSSES",
    "PairLogps",
    "PreferenceLoss",
    "asft",
    "get_preference_loss",
    "log1mexp",
    "log_odds",
    "pair_logps",
    "preference_loss",
]

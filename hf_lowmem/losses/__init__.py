"""Losses as plain functions of log-probabilities, and the one table that names them.

A new preference loss is one file with one function, one test of what is special about it, and one line in
`PREFERENCE_LOSSES`; the contract suite, the trainer and the command line read the table. There is no SFT loss
here: TRL's own, through its fused head, is used as it is. A second copy would drift from it.
"""

from hf_lowmem.losses.asft import asft
from hf_lowmem.losses.logps import PairLogps, PreferenceLoss, log1mexp, log_odds, pair_logps, preference_loss

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {"asft": asft}


__all__ = [
    "PREFERENCE_LOSSES",
    "PairLogps",
    "PreferenceLoss",
    "asft",
    "log1mexp",
    "log_odds",
    "pair_logps",
    "preference_loss",
]

"""Losses as plain functions of log-probabilities, and the one table that names them.

A new preference loss is one file with one function, one test of what is special about it, and one line in
`PREFERENCE_LOSSES`; the contract suite, the trainer and the command line read the table. There is no SFT loss
here: TRL's own, through its fused head, is used as it is. A second copy would drift from it.
"""

from hf_lowmem.preference.losses.asft import asft
from hf_lowmem.preference.losses.cpo import cpo
from hf_lowmem.preference.losses.logps import PairLogps, PreferenceLoss, log1mexp, log_odds, pair_logps, preference_loss
from hf_lowmem.preference.losses.orpo import orpo
from hf_lowmem.preference.losses.simpo import simpo

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {"asft": asft, "orpo": orpo, "simpo": simpo, "cpo": cpo}


__all__ = [
    "PREFERENCE_LOSSES",
    "PairLogps",
    "PreferenceLoss",
    "asft",
    "cpo",
    "log1mexp",
    "log_odds",
    "orpo",
    "pair_logps",
    "preference_loss",
    "simpo",
]

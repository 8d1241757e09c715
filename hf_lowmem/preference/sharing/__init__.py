"""Prompt-shared and packed preference batches: a pair costs P + Cw + Cl tokens instead of 2P + Cw + Cl."""

from hf_lowmem.preference.sharing.check import check_sharing
from hf_lowmem.preference.sharing.layout import KEYS, SharedPairs, shared_layout, without_sharing
from hf_lowmem.preference.sharing.share import share_prompts, unshare_prompts
from hf_lowmem.preference.sharing.training import share_batches, sharing

__all__ = [
    "KEYS",
    "SharedPairs",
    "check_sharing",
    "share_batches",
    "share_prompts",
    "shared_layout",
    "sharing",
    "unshare_prompts",
    "without_sharing",
]

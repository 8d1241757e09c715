"""Sentences of refusals that are said both before a run, by a rule (`hf_lowmem.rules`), and during it, by a guard.

Rules stand above optimizers and activations, guards within them; so what both say stands below them all, once.
"""

from collections.abc import Iterable

TO_FSDP2 = (
    "Use FSDP2 (fsdp=True with fsdp_config={'version': 2}; accelerate: distributed_type: FSDP with fsdp_version: 2; "
    "torch: fully_shard) or DDP"
)

# Of tiers of saved activations.
INSIDE_CHECKPOINT = "inside a checkpoint nothing is left for a tier to compress"
NO_CHECKPOINT = (
    "Set gradient_checkpointing=False (activation_checkpointing=False, model.gradient_checkpointing_disable(); "
    "accelerate: fsdp_activation_checkpointing: false; TRL turns it on by default); 'checkpoint_fp8' is a tier that "
    "checkpoints and compresses"
)

# Of step in backward.
CLIPPING = "the global norm needs every gradient before the first update"
NO_CLIPPING = "apollo, apollo_mini and fira limit the growth of each update by themselves"
# Of sums of gradients in int8.
SUMS_SHARDED = (
    "gradients are reduced in the last backward pass of a window alone, and those of all weights are whole until then, "
    "so that none would be freed before. Leave it unset; galore and natural_galore take an accumulation there"
)

# Of the option `cautious` under ZeRO.
CAUTIOUS_FLAT = (
    "it takes the share of a parameter's values that agree with their gradients, and ZeRO leaves no parameter to take "
    f"it of. Leave cautious unset. {TO_FSDP2}"
)


def flattened(engine: str) -> str:
    """Why an engine that flattens weights leaves an optimizer nothing to work on, with the remedy."""
    return f"{engine} flattens weights, so rows and matrices, and with them the layout of states, are lost. {TO_FSDP2}"


def needs_matrices(name: str, able: Iterable[str]) -> str:
    """Why the method `name` cannot work on vectors, with the remedy. `able`: the methods that can."""
    return f"{name} needs whole matrices. {TO_FSDP2}; under ZeRO-1 and ZeRO-2 these work: {', '.join(able)}"


def nothing_to_round(field: str) -> str:
    """Why a store for bf16 weights has no effect under ZeRO, with the remedy. `field`: as the user calls it."""
    return (
        "ZeRO keeps fp32 copies of the weights and has those updated, so there is nothing to round. Leave "
        f"{field} unset. {TO_FSDP2} to do without the copies"
    )

"""DPO's frozen reference model, in less memory: what each loss needs, and the ways of having it.

DPO reads two numbers a pair from its reference, and loads a whole second model for them. The ways out, as values of
the field `lowmem_reference`, with what is in memory *while training* beside the policy:

| value | in memory | its numbers |
|---|---|---|
| `none` | nothing | for losses that need none: asft, orpo, simpo, cpo, and TRL's sft |
| `adapter` | nothing: the policy with its adapter switched off (PEFT alone) | exact; a forward pass a step |
| `precomputed` | two floats a pair (and an 8-byte key for an iterable dataset) | exact; one pass before training |
| `quantized` | 4.13 bits a linear weight, and the embeddings (bitsandbytes nf4) | biased: `quantize_linears` |
| `full` | the model | exact; a forward pass a step |

`auto` is the first of `none`, `adapter` and `precomputed` that will do, and `full` where `sync_ref_model` or images ask
for one. The default is what TRL does: `adapter` with PEFT, else `full`.

Why TRL's own switch `precompute_ref_log_probs` is not the whole answer: it needs a map-style dataset, and it keeps a
reference that was passed in. Why the quantised reference is not the default way to save: its numbers are wrong by a
little, in the same direction at every step, while `precomputed` is exact and smaller. It is for data that are new at
each step, which nobody can compute beforehand.

    __init__     which way, and how TRL is kept from loading a model that nobody needs
    quantized    a reference in 4 bits
    precomputed  a table of log-probabilities, for datasets to which no column can be added
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from trl.trainer import dpo_trainer

from hf_lowmem.specs import check_choice

__all__ = [
    "NO_REFERENCE_LOSSES",
    "REFERENCES",
    "REFERENCE_FIELDS",
    "check_none_loaded",
    "check_reference",
    "free_reference",
    "resolve_reference",
    "without_reference",
]

REFERENCES = ("auto", "none", "adapter", "precomputed", "quantized", "full")

NO_REFERENCE_LOSSES = ("sft",)  # of TRL's; it reads the chosen answers alone

# Fields of DPOConfig that speak of a reference model.
REFERENCE_FIELDS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)


def check_reference(args: Any, asking: list[str]) -> None:
    """Raise where `lowmem_reference` contradicts another field; `asking` names the losses that need a reference."""
    asked = args.lowmem_reference
    if asked is None:
        return
    check_choice("lowmem_reference", asked, REFERENCES)
    if not asking:
        if asked not in ("auto", "none"):
            raise ValueError(
                f"lowmem_reference={asked!r} has no effect with loss_type={args.loss_type!r}, which needs no reference "
                "model. Leave it unset."
            )
        return
    if asked == "none":
        raise ValueError(
            f"lowmem_reference='none', but loss_type={asking[0]!r} is defined by a reference model. Set "
            "lowmem_reference='auto' for the way that takes least memory, or a loss that needs none."
        )
    if args.precompute_ref_log_probs and asked not in ("auto", "precomputed"):
        raise ValueError(
            f"precompute_ref_log_probs=True contradicts lowmem_reference={asked!r}. Leave precompute_ref_log_probs "
            "unset, or set lowmem_reference='precomputed'."
        )
    if args.sync_ref_model and asked not in ("auto", "full"):
        raise ValueError(
            f"sync_ref_model=True needs a reference model whose weights can be updated, and lowmem_reference={asked!r} "
            "has none. Set lowmem_reference='full', or leave sync_ref_model unset."
        )
    for engine in ("fsdp", "deepspeed"):
        if asked == "quantized" and getattr(args, engine, None):
            raise ValueError(
                f"{engine}={getattr(args, engine)!r} cannot shard a model of 4-bit weights, which "
                "lowmem_reference='quantized' asks for. Set lowmem_reference='precomputed'."
            )


def resolve_reference(args: Any, asking: list[str], *, peft: bool, passed: bool, images: bool) -> str:
    """The one of `none`, `adapter`, `precomputed`, `quantized` and `full` that it is, now that the model is known.

    Args:
        args: the config.
        asking: names of the losses that need a reference.
        peft: whether the policy is, or becomes, a PEFT model.
        passed: whether a `ref_model` was passed.
        images: whether the dataset has images, for which nothing can be precomputed.

    Raises:
        ValueError: where a `ref_model` would be ignored, or there is no way to what was asked for.
    """
    asked = getattr(args, "lowmem_reference", None)
    if not asking:
        if passed:
            raise ValueError(
                f"ref_model was passed, but loss_type={args.loss_type!r} needs no reference model and would ignore it. "
                "Drop ref_model."
            )
        return "none"
    own = "adapter" if peft and not passed else "full"
    if args.precompute_ref_log_probs:
        own = "precomputed"
    if asked is None:
        return own
    if asked == "auto":
        if own != "full" or args.sync_ref_model or images:
            return own
        return "precomputed"
    if asked == "adapter" and (not peft or passed):
        reason = "ref_model was passed" if passed else "the model has no adapter that could be switched off"
        raise ValueError(
            f"lowmem_reference='adapter', but {reason}. "
            + ("Drop ref_model." if passed else "Pass a peft_config, or set lowmem_reference='precomputed'.")
        )
    if asked in ("full", "quantized") and peft and not passed:
        raise ValueError(
            f"lowmem_reference={asked!r} beside an adapter would load a second copy of weights that are there: the "
            "policy without its adapter is the reference. Set lowmem_reference='adapter', or pass another ref_model."
        )
    return asked


@contextlib.contextmanager
def without_reference(policy_is_loaded: bool) -> Iterator[None]:
    """Give DPOTrainer's constructor None where it loads a reference model.

    TRL has no switch for that. `precompute_ref_log_probs=True` comes near, but it hashes every weight, and under FSDP
    it loads the model all the same. So `create_model_from_path` answers None once the policy exists; TRL guards each
    later use of `ref_model` against None. If a future TRL asks in another way, the check in the trainer tells.
    """
    load = dpo_trainer.create_model_from_path
    loaded = policy_is_loaded

    def only_the_policy(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        if loaded:
            return None
        loaded = True
        return load(*args, **kwargs)

    with mock.patch.object(dpo_trainer, "create_model_from_path", only_the_policy):
        yield


def check_none_loaded(trainer: Any, had_adapters: set[str]) -> None:
    """Raise if TRL did load a reference; drop its frozen copy ("ref") of an adapter that was trained before."""
    if trainer.ref_model is not None:
        raise RuntimeError(
            f"TRL loaded a reference model although loss_type={trainer.args.loss_type!r} needs none. This version of "
            "trl is not supported by hf_lowmem; please report it with the version."
        )
    if "ref" in set(getattr(trainer.model, "peft_config", ())) - had_adapters:
        trainer.model.delete_adapter("ref")


def free_reference(trainer: Any) -> None:
    """Let go of a reference that was passed in. Its owner may still hold it, but no longer on the device."""
    reference, trainer.ref_model = trainer.ref_model, None
    trainer.accelerator._models = [m for m in trainer.accelerator._models if m is not reference]
    reference.to("cpu")

"""Effect of the fields `lowmem_share_prompt` and `lowmem_pack_tokens` on a trainer."""

import contextlib
from collections.abc import Iterator
from typing import Any

from hf_lowmem.preference.sharing.check import check_sharing
from hf_lowmem.preference.sharing.layout import SharedPairs
from hf_lowmem.preference.sharing.share import share_prompts, shares_prompts, unshare_prompts

__all__ = ["share_batches", "sharing"]


def share_batches(trainer: Any) -> None:
    """Let a DPOTrainer, and its reference model, run shared batches, if its arguments say so. Once: again is nothing.

    To be called as soon as the models exist. Where reference log-probabilities are precomputed, that is inside the
    trainer's constructor.

    Raises:
        ValueError: where sharing would not be exact for the policy or the reference model.
    """
    args = trainer.args
    if not getattr(args, "lowmem_share_prompt", False) or getattr(trainer, "_shares_batches", False):
        return
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    models = [trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model) if m is not None]
    for model in models:
        check_sharing(model, args, trial=not sharded)
    trainer._shared_models = _put_on(models)
    trainer.data_collator = SharedPairs(trainer.data_collator, args.lowmem_pack_tokens, args.pad_to_multiple_of)
    trainer._shares_batches = True


@contextlib.contextmanager
def sharing(trainer: Any) -> Iterator[None]:
    """Let a trainer's models take shared batches while the block runs; afterwards they are as without it.

    Does nothing for a trainer whose arguments do not ask for it, inside of another such block, and to models that the
    user shares by hand.
    """
    if not getattr(trainer, "_shares_batches", False) or getattr(trainer, "_is_sharing", False):
        yield
        return
    models = [trainer.accelerator.unwrap_model(m) for m in (trainer.model, trainer.ref_model) if m is not None]
    put_on, trainer._shared_models, trainer._is_sharing = [*trainer._shared_models, *_put_on(models)], [], True
    try:
        yield
    finally:
        trainer._is_sharing = False
        for model in put_on:
            unshare_prompts(model)


def _put_on(models: list[Any]) -> list[Any]:
    """Share these models' prompts; those that did not share them before."""
    plain = [m for m in models if not shares_prompts(m)]
    for model in plain:
        share_prompts(model)
    return plain

"""What the fields `lowmem_share_prompt` and `lowmem_pack_tokens` do to a trainer."""

from typing import Any

from hf_lowmem.pairs.check import check_sharing
from hf_lowmem.pairs.layout import SharedPairs
from hf_lowmem.pairs.share import share_prompts

__all__ = ["share_batches"]


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
    for model in models:
        share_prompts(model)
    trainer.data_collator = SharedPairs(trainer.data_collator, args.lowmem_pack_tokens, args.pad_to_multiple_of)
    trainer._shares_batches = True

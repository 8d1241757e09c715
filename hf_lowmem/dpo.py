"""Preference training: TRL's DPOTrainer with the fields, and losses that need no reference model.

TRL's loss types are TRL's: its code computes them, and nothing here repeats it. Ours take its collator, its fused head
(per-token log-probabilities, no logits) and its metrics' names, and differ where it matters for memory: a loss that
needs no reference never loads one. DPOTrainer loads a reference model for every loss, unless one of its private steps
is told otherwise; which one, and why that one, is said at `_without_reference`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from hf_lowmem.arguments import LowMemArguments
from hf_lowmem.losses import PREFERENCE_LOSSES, pair_logps
from hf_lowmem.specs import LossSpec, check_choice
from hf_lowmem.trainer import LowMemTrainerMixin

_TRL_FIELDS = DPOConfig.__dataclass_fields__
TRL_LOSSES = re.findall(r"'(\w+)'", _TRL_FIELDS["loss_type"].metadata["help"])

# Fields of DPOConfig that speak of a reference model, or of TRL's own formulas.
REFERENCE_FIELDS = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
)


@dataclass
class LowMemDPOConfig(LowMemArguments, DPOConfig):
    """`trl.DPOConfig` with the fields of `LowMemArguments`, our losses beside TRL's, and their options.

    ```python
    args = LowMemDPOConfig("out", loss_type="asft", asft_lambda=1.0, optim="apollo", learning_rate=6e-6)
    ```

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"Loss: one of hf_lowmem's ({', '.join(PREFERENCE_LOSSES)}; no reference model is loaded), or one "
            f"or several of TRL's ({', '.join(TRL_LOSSES)}), combined with `loss_weights`."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the implicit reward. Default: the loss's own, 1 for asft and "
            f"{_TRL_FIELDS['beta'].default} for TRL's losses. After an SFT stage, 0.1 suits asft well."
        },
    )
    asft_lambda: float | None = field(
        default=None, metadata={"help": "Weight of the two alignment terms of loss_type='asft'. Default: 1."}
    )

    def __post_init__(self) -> None:
        types = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        for name in types:
            check_choice("loss_type", name, [*PREFERENCE_LOSSES, *TRL_LOSSES])
        ours = [name for name in types if name in PREFERENCE_LOSSES]
        if ours and len(types) > 1:
            raise ValueError(
                f"loss_type={types!r}: {ours[0]!r} cannot be combined with other losses in this version. Use it alone; "
                "it has its own supervised term."
            )
        if self.asft_lambda is not None and "asft" not in ours:
            raise ValueError(
                f"asft_lambda={self.asft_lambda!r} has no effect with loss_type={types!r}. Leave it unset, or set "
                "loss_type='asft'."
            )
        if ours:
            for name in REFERENCE_FIELDS:
                default = _TRL_FIELDS[name].default if name in _TRL_FIELDS else getattr(self, name, None)
                if getattr(self, name, default) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect with loss_type={ours[0]!r}, which needs no "
                        "reference model and none of TRL's variants. Leave it unset."
                    )
            spec = LossSpec(
                name=ours[0],
                beta=1.0 if self.beta is None else self.beta,
                asft_lambda=1.0 if self.asft_lambda is None else self.asft_lambda,
            )
            self.beta, self.asft_lambda = spec.beta, spec.asft_lambda
        elif self.beta is None:
            self.beta = _TRL_FIELDS["beta"].default
        super().__post_init__()


@contextlib.contextmanager
def _without_reference(policy_is_loaded: bool) -> Iterator[None]:
    """While DPOTrainer is constructed, let its request for a reference model come back empty.

    TRL has no switch for that. `precompute_ref_log_probs=True` comes near, but it hashes every weight, and under FSDP
    it loads the model all the same. So `create_model_from_path` answers None once the policy exists; TRL guards each
    later use of `ref_model` against None. If a future TRL asks in another way, the check in `__init__` tells.
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


class RefuseEmptyCompletions:
    """A collator around another: an error, while the masks are still on the host, for a completion without a token.

    TRL's collator gives one, without a word, where a prompt fills `max_length`. Its log-probability is 0 and trains
    nothing, while the pair's other completion would be trained alone.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        empty = (batch["completion_mask"][:, 1:].sum(dim=1) == 0).nonzero().flatten().tolist()
        if empty:
            row = empty[0]
            which = "chosen" if row < len(examples) else "rejected"
            raise ValueError(
                f"the {which} completion of example {row % len(examples)} of a batch has no token, so the pair says "
                "nothing. Drop empty completions from the dataset; if the prompt fills max_length, raise max_length or "
                "shorten the prompt."
            )
        return batch


class LowMemDPOTrainer(LowMemTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` for `LowMemDPOConfig`: same constructor, TRL's losses by TRL, ours without a reference model.

    ```python
    args = LowMemDPOConfig("out", loss_type="asft", learning_rate=6e-6)
    LowMemDPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer).train()
    ```

    Raises:
        ValueError: where a `ref_model` is passed to a loss that needs none.
    """

    ref_model: Any
    _metrics: dict[str, Any]

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        loss = args.loss_type[0] if isinstance(args, LowMemDPOConfig) else None
        self.lowmem_loss = PREFERENCE_LOSSES.get(loss) if loss else None
        if self.lowmem_loss is None or self.lowmem_loss.needs_reference:
            super().__init__(model, ref_model, args, **kwargs)
            return
        if ref_model is not None:
            raise ValueError(
                f"ref_model was passed, but loss_type={loss!r} needs no reference model and would ignore it. "
                "Drop ref_model."
            )
        with _without_reference(policy_is_loaded=not isinstance(model, str)):
            super().__init__(model, None, args, **kwargs)
        if self.ref_model is not None:
            raise RuntimeError(
                f"TRL loaded a reference model although loss_type={loss!r} needs none. This version of trl is not "
                "supported by hf_lowmem; please report it with the version."
            )
        self.data_collator = RefuseEmptyCompletions(self.data_collator)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.lowmem_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        mask = inputs["completion_mask"]
        model_inputs = {k: v for k, v in inputs.items() if k != "completion_mask"} | {"use_cache": False}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = model(**model_inputs, labels=labels, fused_lm_head=True)
        shifted = mask[:, 1:]
        tail = slice(-shifted.size(1), None)  # prompt-learning PEFT puts virtual tokens before the real ones

        policy = pair_logps(outputs.log_probs[:, tail], shifted)
        per_pair, metrics = self.lowmem_loss(policy, beta=self.args.beta, asft_lambda=self.args.asft_lambda)
        loss = per_pair.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss.detach()[None]
        self._log_pairs(metrics, outputs, shifted, tail, inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # for compute_metrics, as TRL does: the fused head builds no logits
            return loss, model(**model_inputs)

    def _log_pairs(
        self, metrics: dict[str, Tensor], outputs: Any, mask: Tensor, tail: slice, attention_mask: Tensor
    ) -> None:
        """Collect metrics under TRL's names; the trainer averages them over a logging step.

        Args:
            metrics: (B,) each.
            outputs: of the fused head, (2B, T) each, chosen above rejected.
            mask: (2B, T), 1 on completion tokens.
            tail: the real tokens' positions in `outputs`.
            attention_mask: (2B, T + 1).
        """
        mode = "train" if self.model.training else "eval"
        log = self._metrics[mode]
        gather: Any = self.accelerator.gather_for_metrics
        for name, value in metrics.items():
            log[name].append(gather(value).mean().item())
        valid = mask.bool()
        chosen, rejected = valid.chunk(2)
        chosen_logits, rejected_logits = outputs.mean_logits[:, tail].chunk(2)
        correct = outputs.is_top1[:, tail].chunk(2)[0] & chosen
        for name, values, where in (
            ("entropy", outputs.entropy[:, tail].detach(), valid),
            ("logits/chosen", chosen_logits, chosen),
            ("logits/rejected", rejected_logits, rejected),
            ("mean_token_accuracy", correct, chosen),
        ):
            total, count = gather((values * where).sum()).sum(), gather(where.sum()).sum()
            log[name].append((total / count.clamp(min=1)).item())
        if mode == "train":
            self._total_train_tokens += gather(attention_mask.sum()).sum().item() // self._tp_size
        log["num_tokens"] = [self._total_train_tokens]

"""Preference training: TRL's DPOTrainer with the fields, and losses that need no reference model.

TRL's loss types are TRL's: its code computes them, and nothing here repeats it. Ours are added to them from the same
forward pass: `Captured` stands in for the model while TRL computes its part, and keeps the per-token log-probabilities
that came out of it. With no loss of TRL's at all its part is an empty sum, so that its metrics, its router loss and its
treatment of prompt-learning adapters are used as they are, also then.

Why not one loss function with TRL's formulas beside ours: a second copy of a loss drifts. Why not our own forward pass
for ours: in a mixture it would be a second one. What a loss needs a reference model for, and the ways of having one in
less memory, is `hf_lowmem.preference.reference`.
"""

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from hf_lowmem.memory.progress import others
from hf_lowmem.patching import in_eval_mode
from hf_lowmem.preference.collate import KEYS, MARGINS, PairCollator, has_images
from hf_lowmem.preference.losses import PREFERENCE_LOSSES, PairLogps, pair_logps
from hf_lowmem.preference.reference import check_none_loaded, free_reference, resolve_reference, without_reference
from hf_lowmem.preference.reference.adapters import check_adapter, whole_copies
from hf_lowmem.preference.reference.identity import first_digest_of, identity_of
from hf_lowmem.preference.reference.passed import copied_reference, own_modules_only
from hf_lowmem.preference.reference.precomputed import ReferenceLogps, ReferenceRecord, read_stream
from hf_lowmem.preference.reference.quantized import quantized_reference
from hf_lowmem.preference.reference.sharded import prepare_fsdp
from hf_lowmem.preference.sharing import SharedPairs, share_batches, sharing
from hf_lowmem.specs import LossSpec
from hf_lowmem.training.dpo_config import TRL_LOSSES, LowMemDPOConfig
from hf_lowmem.training.head import BlockedHead
from hf_lowmem.training.mixin import LowMemTrainerMixin

__all__ = ["TRL_LOSSES", "Captured", "LowMemDPOConfig", "LowMemDPOTrainer"]


TOO_LATE = (
    "so the reference log-probabilities of another dataset cannot be computed. Pass it to the trainer as eval_dataset"
)


class Captured:
    """A model's stand-in for one call through its fused head, whose result it keeps.

    Args:
        model: the model as the trainer wraps it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            self.outputs = outputs
        return outputs


@contextlib.contextmanager
def _replaced(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of `target` to other values while the block runs."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def _innermost(collator: Any) -> Any:
    """The collator that makes the tokens, inside of ours."""
    while isinstance(collator, PairCollator | SharedPairs):
        collator = collator.collator
    return collator


class LowMemDPOTrainer(LowMemTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` for `LowMemDPOConfig`: same constructor, TRL's losses by TRL, ours without a reference model.

    ```python
    args = LowMemDPOConfig("out", loss_type="asft", learning_rate=6e-6)
    LowMemDPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer).train()
    ```

    With arguments of the plain class it does what DPOTrainer does. `reference_kind` says which way to a reference was
    taken. In a mixture, "rewards/*" are TRL's, if it has a loss that has them, else those of our first loss; those of
    the others are logged under their names ("asft/rewards/chosen").

    Without a `ref_model` the reference is the model that is passed, as it is when the trainer is constructed, for every
    `lowmem_reference`: so the first loss of DPO is log 2. A model in memory is copied for "full", where TRL loads
    another from the name in its config, which is an older one if the model was trained since. The reference runs in
    eval mode, whatever mode the policy is in. A run is resumed with the model that it was started from, whose weights
    the checkpoint's then replace.

    Raises:
        ValueError: where a `ref_model` would be ignored; images meet what was made for text; a column is missing; an
            adapter's base is not the model that was passed.
    """

    CONFIG = DPOConfig
    HEAD = BlockedHead
    ref_model: Any
    train_dataset: Any
    _metrics: dict[str, Any]
    reference_logps: ReferenceLogps | None = None
    _precompute_model_hash: str | None  # TRL's name; of `first_digest_of`
    _reference_identity: str | None = None
    _identified = False
    _passed_reference_is_freed = False
    _reference_is_an_untried_copy = False

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if not isinstance(args, LowMemDPOConfig):
            self.lowmem_losses: list[LossSpec] = []
            self.reference_kind = None
            super().__init__(model, ref_model, args, **kwargs)
            return
        (model, ref_model, args), kwargs = self._within_budget((model, ref_model, args), kwargs)
        self.lowmem_losses = args.lowmem_loss_specs()
        evals = kwargs.get("eval_dataset")
        datasets = {"train_dataset": kwargs.get("train_dataset")}
        datasets |= evals if isinstance(evals, dict) else {"eval_dataset": evals}
        fields = ("lowmem_reference", "lowmem_margin_column", "lowmem_share_prompt")
        text_only = [spec.name for spec in self.lowmem_losses] + [f for f in fields if getattr(args, f)]
        images = has_images(datasets, margin_column=args.lowmem_margin_column, text_only=text_only)
        peft = kwargs.get("peft_config") is not None or (not isinstance(model, str) and bool(is_peft_model(model)))
        self.reference_kind = kind = resolve_reference(
            args, args.asking_losses, peft=peft, passed=ref_model is not None, images=images
        )
        had_adapters = set[str](getattr(model, "peft_config", ()))
        if peft and ref_model is None and kind != "none":
            check_adapter(kind, model, kwargs.get("peft_config"))
        self._reference_is_an_untried_copy = ref_model is None and not isinstance(model, str)
        loading = contextlib.ExitStack()
        loading.enter_context(mock.patch.object(dpo_trainer, "hash_module", first_digest_of))
        loading.enter_context(mock.patch.object(dpo_trainer, "prepare_fsdp", prepare_fsdp))
        if peft and ref_model is None and kwargs.get("peft_config") is None and not isinstance(model, str):
            loading.enter_context(whole_copies(model))
        if kind == "none":
            loading.enter_context(without_reference(not isinstance(model, str)))
        elif self._reference_is_an_untried_copy:
            loading.enter_context(copied_reference(model))
        if kind == "quantized":
            ref_model = quantized_reference(model, ref_model, args)
        seen = {
            "loss_type": args.trl_losses,
            "loss_weights": [args.weight_of(name) for name in args.trl_losses],
            "beta": args.trl_beta,
            "precompute_ref_log_probs": kind == "precomputed",
        }
        with _replaced(args, **seen), loading:
            super().__init__(model, ref_model, args, **kwargs)
        if kind == "none":
            check_none_loaded(self, had_adapters)
        elif kind == "precomputed" and ref_model is not None:
            free_reference(self)
            self._passed_reference_is_freed = True
        if kind == "precomputed" and self._precompute_model_hash is not None:
            self.add_callback(ReferenceRecord(self._precompute_model_hash))
        self._prepare_pairs()

    def _prepare_pairs(self) -> None:
        """Prepare the collator and the models, once they exist."""
        self.data_collator = PairCollator(
            self.data_collator,
            refuse_empty=bool(self.lowmem_losses),
            margin_column=self.args.lowmem_margin_column,
            keyed=self.reference_kind == "precomputed",
        )
        share_batches(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; shared batches are for the models while this runs."""
        with sharing(self):
            return super().train(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as the parent does, with shared batches if training has them."""
        with sharing(self):
            return super().predict(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, which adds columns, where it can; else our table, from the very batches of training.

        TRL's needs a map-style dataset and, with several processes, one whose files they all see: it writes the columns
        beside them, and for a dataset in memory that is a temporary folder of rank 0.
        """
        if not isinstance(self.args, LowMemDPOConfig):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        share_batches(self)  # the constructor is not done yet
        if not self._identified:
            self._reference_identity = identity_of(self, self._precompute_model_hash, _innermost(self.data_collator))
            self._identified = True
        mapped = not isinstance(dataset, IterableDataset)
        if mapped and (dataset.cache_files or self.accelerator.num_processes == 1):
            identity = self._reference_identity or uuid.uuid4().hex  # without one, nothing that was computed before
            with _replaced(self, _precompute_model_hash=identity), others(shown=not self.args.disable_tqdm):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        if self.reference_logps is None:
            self.reference_logps = ReferenceLogps.of_reference(self.args.output_dir, self._reference_identity)
        read_stream(self, dataset, self.reference_logps)
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The reference's log-probabilities, in eval mode, for a batch that has what our collator adds."""
        if not isinstance(self.args, LowMemDPOConfig):
            return super().compute_ref_log_probs(model, inputs)
        inputs = {k: v for k, v in inputs.items() if k not in (MARGINS, KEYS)}
        trial = contextlib.nullcontext()
        if self._reference_is_an_untried_copy and self.ref_model is not None:
            trial = own_modules_only(self.accelerator.unwrap_model(self.model))
        with in_eval_mode(model), trial:
            computed = super().compute_ref_log_probs(model, inputs)
        self._reference_is_an_untried_copy = False
        return computed

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the parent does; an iterable dataset too, under every reference. A dataset for which there is no
        reference any more is refused before it is read."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._check_reference()
        with sharing(self):
            return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[arg-type]

    def _check_reference(self) -> None:
        """Raise where reference log-probabilities of one more dataset cannot be computed."""
        trained = self.state.global_step > 0 and not is_peft_model(self.model)
        if self.reference_kind != "precomputed" or trained:  # of which TRL says what to do
            return
        if self._passed_reference_is_freed:
            raise ValueError(
                f"lowmem_reference='precomputed': the reference model was freed before training, {TOO_LATE}."
            )
        now = first_digest_of(self.model)
        if now is None:
            self._reference_identity = None
        elif now != self._precompute_model_hash:
            raise ValueError(
                "lowmem_reference='precomputed': the weights of the reference have been changed since the trainer was "
                f"constructed, {TOO_LATE}."
            )

    def _load_callback_state(self) -> None:
        """Check first that the reference is that of the run which is resumed."""
        records: Any = self.state.stateful_callbacks
        saved = records.get(ReferenceRecord.__name__)
        if isinstance(saved, dict) and self.reference_kind == "precomputed":
            ReferenceRecord.check(saved, self._precompute_model_hash)
        super()._load_callback_state()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = getattr(self.args, "lowmem_margin_column", None)
        if column is not None and column not in self._signature_columns:
            self._signature_columns.append(column)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        margins, keys = inputs.pop(MARGINS, None), inputs.pop(KEYS, None)
        completion_mask = inputs["completion_mask"]
        seen: dict[str, Any] = {}
        if self.reference_kind == "none":
            zero = completion_mask.new_zeros(len(completion_mask) // 2, dtype=torch.float32)
            inputs |= {"ref_chosen_logps": zero, "ref_rejected_logps": zero}
            seen["precompute_ref_logps"] = True
        elif keys is not None:
            if self.reference_logps is None:
                raise ValueError(
                    "lowmem_reference='precomputed': this dataset has no reference log-probabilities. Pass it to the "
                    "trainer as eval_dataset, or to evaluate(), which compute them."
                )
            inputs |= self.reference_logps.of(keys, completion_mask.device)
        elif "ref_chosen_logps" not in inputs and self.reference_kind in ("full", "quantized", "adapter"):
            # Before the policy's forward pass, so that it does not run on top of all that is kept for backward.
            model_of_reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(model_of_reference, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            seen["precompute_ref_logps"] = True
        if margins is not None:  # TRL multiplies the log-ratio's difference by it, pair by pair
            w, k = self.args.lowmem_margin_w, self.args.lowmem_margin_k
            seen["beta"] = self.beta * (1 + w * -torch.expm1(-k * margins))
        captured = Captured(model)
        with _replaced(self, **seen):
            result = super()._compute_loss(captured, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)

        mask = completion_mask[:, 1:]
        # Prompt-learning PEFT puts virtual tokens before the real ones.
        policy = pair_logps(captured.outputs.log_probs[:, -mask.size(1) :], mask)
        loss = loss + self._add_losses(policy)
        return (loss, outputs) if return_outputs else loss

    def _add_losses(self, policy: PairLogps) -> Any:
        """The weighted sum of our losses, and their metrics."""
        log = self._metrics["train" if self.model.training else "eval"]
        gather: Any = self.accelerator.gather_for_metrics
        if self.reference_kind == "none":  # TRL has compared the policy with nothing
            for name in [name for name in log if name.startswith("rewards/")]:
                log[name].pop()
        means = {"logps_mean/chosen": policy.chosen_mean, "logps_mean/rejected": policy.rejected_mean}
        total: Any = 0.0
        for i, spec in enumerate(self.lowmem_losses):
            per_pair, metrics = PREFERENCE_LOSSES[spec.name](policy, **spec.options)
            total = total + spec.weight * per_pair.mean()
            prefix = "" if self.reference_kind == "none" and i == 0 else f"{spec.name}/"
            means |= {prefix + n: v for n, v in metrics.items() if n.startswith(("rewards/", "loss/"))}
        for name, value in means.items():
            log[name].append(gather(value.detach()).mean().item())
        for name in [name for name, values in log.items() if not values]:
            del log[name]
        return total

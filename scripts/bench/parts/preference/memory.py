"""Peak of a training step by loss, weighed without a device: TRL's preference trainers beside ours.

The trainers are real, made around a tiny model; their own loss code is then called on a model that FakeTensorMode
pretends to have. What it computes is nothing, and every tensor's bytes are counted. Three things stand in for a CUDA
device, on which the fused head allocates less than on a CPU: it scores completion tokens only, its kernels change
a tile of logits in place, and its products add to fp32 sums inside the matrix product. TRL's ORPO and CPO use plain
operations of torch, which need no stand-in.

Counted: weights, gradients, activations and the reference model, in bf16, layers checkpointed (TRL's default). Not
counted: optimizer state, a constant that scripts/bench/optimizers.py measures. Weighed twice: with gradients kept until
the optimizer's step, and freed as they come (`lowmem_step_in_backward`; adapters come near). Where they are kept, the
peak may be at the end of backward, when the logits are long gone: there a fused head saves nothing.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.memory import parameter_bytes
from hf_lowmem.preference.sharing import SharedPairs, share_prompts
from parts.preference import sums
from parts.preference.train import METHODS, quiet
from parts.record import Row
from parts.tracked import total

VOCABULARIES = (49152, 128256, 151936)  # SmolLM2, Llama 3, Qwen 2.5
SIZE: dict[str, Any] = {"hidden": 4096, "layers": 8, "pairs": 4, "prompt": 512, "answer": 512}
SMOKE: dict[str, Any] = {"hidden": 64, "layers": 2, "pairs": 2, "prompt": 256, "answer": 256}
HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # as DPOTrainer asks of its policy


@dataclass(frozen=True)
class Way:
    """A trainer, its loss, and what it keeps beside the policy."""

    name: str
    config: Any
    trainer: Any
    options: dict[str, Any]
    reference: bool = False  # a second model in memory
    shared: bool = False  # prompts of a pair once

    @property
    def plain(self) -> bool:
        """Whether it takes the batches of DPOTrainer."""
        return self.trainer not in (ORPOTrainer, CPOTrainer)


def ours(method: str, *, shared: bool = False) -> Way:
    options = METHODS[method]
    assert options is not None
    name = f"hf_lowmem {method}" + (", prompts shared" if shared else "")
    return Way(name, LowMemDPOConfig, LowMemDPOTrainer, options, shared=shared)


WAYS = (
    Way("TRL DPO", DPOConfig, DPOTrainer, {}, reference=True),
    Way("TRL ORPO", ORPOConfig, ORPOTrainer, {}),
    Way("TRL CPO", CPOConfig, CPOTrainer, {}),
    ours("DPO"),
    ours("ASFT"),
    ours("ORPO"),
    ours("SimPO"),
    ours("CPO"),
    ours("DPO", shared=True),
    ours("ASFT", shared=True),
)


def tiny() -> Any:
    return sums.build_model(16, 1, 0)


def make_trainer(way: Way) -> Any:
    """A trainer of this kind; its own model is not used."""
    pairs = sums.preferences([sums.Pair(sums.Sum(10, 10), "21"), sums.Pair(sums.Sum(12, 30), "41")])
    options: dict[str, Any] = way.options | {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    options.pop("lowmem_reference", None)  # its table is made here, of zeros
    given: dict[str, Any] = {"model": tiny(), "train_dataset": pairs, "processing_class": sums.tokenizer()}
    if way.plain and "sigmoid" in options.get("loss_type", ["sigmoid"]):
        given["ref_model"] = tiny()
    with quiet():
        trainer = way.trainer(args=way.config("unused", **options), **given)
    trainer.model.train()
    if way.plain and not way.reference:
        trainer.precompute_ref_logps = True
    return trainer


class NoValues(TorchFunctionMode):
    """Answers what is asked of the values of fake tensors, which have none: metrics, and which tokens are scored.

    rows_answer: completion tokens in each row. A row of labels has that many, and so has a row of a mask that indexes.
    """

    def __init__(self, rows_answer: int) -> None:
        super().__init__()
        self.answer = rows_answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.item:
            return 1.0
        if func is Tensor.__bool__:
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            x, mask = args
            return x.flatten(0, mask.dim() - 1)[: mask.shape[0] * self.answer].clone()
        return func(*args, **(kwargs or {}))


def in_place(*args: Any, **kwargs: Any) -> None:
    """A kernel of the fused head: it reads a tile and changes what it was given."""


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """TRL's fused head allocates what it would on a CUDA device."""
    with (
        mock.patch.object(trl_utils, "_use_triton", return_value=True),  # compact: completion tokens only
        mock.patch.object(chunked_logprob, "_forward_tile", in_place),
        mock.patch.object(chunked_logprob, "_backward_tile", in_place),
        mock.patch.object(chunked_logprob, "_addmm_fp32", in_place),
    ):
        yield


def batch_of(way: Way, size: dict[str, Any]) -> dict[str, Any]:
    """A batch as the trainer's collator would give it, all prompts and answers of one length."""
    pairs, prompt, length = size["pairs"], size["prompt"], size["prompt"] + size["answer"]
    if way.plain:
        ids = torch.randint(3, 1000, (2 * pairs, length), generator=torch.Generator().manual_seed(0))
        ids[pairs:, :prompt] = ids[:pairs, :prompt]
        mask = torch.zeros(2 * pairs, length, dtype=torch.long)
        mask[:, prompt:] = 1
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        if way.shared:
            batch = SharedPairs(lambda _: batch)([])
        if not way.reference:
            batch |= {"ref_chosen_logps": torch.zeros(pairs), "ref_rejected_logps": torch.zeros(pairs)}
        return batch
    labels = torch.full((pairs, length), -100)
    labels[:, prompt:] = 3
    one = {"input_ids": torch.full((pairs, length), 3), "attention_mask": torch.ones(pairs, length), "labels": labels}
    return {f"{side}_{name}": value.clone() for side in ("chosen", "rejected") for name, value in one.items()}


def build(vocabulary: int, size: dict[str, Any]) -> Any:
    """A bf16 model of Llama-3-8B's shape, with `layers` of its 32 layers."""
    width = size["hidden"]
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": width // 128 or 1,
        "num_key_value_heads": max(width // 512, 1),
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def step(trainer: Any, way: Way) -> Callable[[Any, Any], Tensor]:
    """The trainer's own loss of (model, batch)."""
    if way.plain:
        return lambda model, batch: trainer._compute_loss(model, batch, False)
    return lambda model, batch: trainer.get_batch_loss_metrics(model, batch)[0]


def weigh(way: Way, vocabulary: int, size: dict[str, Any], *, freed: bool) -> dict[str, Any]:
    """Bytes by kind at the peak of forward and backward."""
    trainer, batch = make_trainer(way), batch_of(way, size)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, warnings.catch_warnings(), as_on_cuda():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = build(vocabulary, size).train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for p in model.parameters() if freed else ():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            tracked = [model]
            if way.plain:
                trl_utils.add_fused_lm_head(model, outputs=HEAD_OUTPUTS)
            if way.shared:
                share_prompts(model)
            if way.reference:
                trainer.ref_model = build(vocabulary, size).eval()
                trl_utils.add_fused_lm_head(trainer.ref_model)
                tracked.append(trainer.ref_model)
        finally:
            torch.set_default_dtype(torch.float32)
        batch = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        tracker.track_external(*tracked)
        with tracker, NoValues(size["answer"]):
            step(trainer, way)(model, batch).backward()
        reference = parameter_bytes(trainer.ref_model) if way.reference else 0
        weights = parameter_bytes(model)
    peak = total(tracker.get_tracker_snapshot("peak"))
    parts = {
        "weights": weights,
        "reference": reference,
        "gradients": peak.get("GRAD", 0),
        "activations and temporaries": peak["Total"] - peak["PARAM"] - peak.get("GRAD", 0),
    }
    return {"peak": peak["Total"], "parts": parts, "kinds": {k: v for k, v in peak.items() if v}}


def rows(smoke: bool) -> Iterator[Row]:
    size, ways = SIZE, list(WAYS)
    if smoke:
        size, ways = SMOKE, [w for w in WAYS if w.name in ("TRL DPO", "TRL ORPO", "hf_lowmem DPO", "hf_lowmem ORPO")]
    for vocabulary in VOCABULARIES[1:2] if smoke else VOCABULARIES:
        for way in ways:
            for freed in (True,) if smoke else (False, True):
                began = time.perf_counter()
                found = weigh(way, vocabulary, size, freed=freed)
                common = {"way": way.name, "vocabulary": vocabulary, "freed": freed, "size": size}
                yield common | found | {"seconds_to_weigh": time.perf_counter() - began}

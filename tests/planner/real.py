"""Small models, and a real run of the real trainer on the CPU, weighed by others than the planner: autograd's
saved-tensor hooks, the tensors that model and optimizer hold, and the CPU allocator's own trace."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_lowmem.memory import gradient_bytes, measure_saved, optimizer_bytes, parameter_bytes
from hf_lowmem.memory.count import total_bytes
from hf_lowmem.planner.methods import method_of
from hf_lowmem.planner.models import token_maker
from hf_lowmem.sft import LowMemSFTConfig


def small_config(**overrides: Any) -> LlamaConfig:
    """A Llama whose layers outweigh the tiles of TRL's fused head, which are 32,768 wide whatever the vocabulary."""
    values: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    }
    return LlamaConfig(**values | overrides)


def arguments(config: Any = LowMemSFTConfig, **overrides: Any) -> Any:
    values: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": None if "lowmem_activations" in overrides else False,
        "optim": "adamw_torch",
        "max_length": 48,
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return config(tempfile.mkdtemp(), **values | overrides)


@dataclass
class Truth:
    weights: int = 0
    gradients: int = 0
    states: int = 0
    saved: int = 0
    peak: int = 0


class Watch(TrainerCallback):
    def __init__(self, truth: Truth) -> None:
        self.truth = truth

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.truth.gradients = gradient_bytes(kwargs["model"])

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.truth.states = optimizer_bytes(kwargs["optimizer"])


def _model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def measure(
    config: LlamaConfig, args: Any, dtype: torch.dtype, *, peft_config: Any = None, reference: bool = False
) -> Truth:
    """Two steps of full batches, as the planner takes."""
    truth = Truth()
    method = method_of(args)

    class Counting(method.trainer()):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 0:  # hooks keep Python objects alive a little longer; the peak is step 2's
                with measure_saved(self.model) as saved:
                    loss = super().compute_loss(*args, **kwargs)
                    truth.saved = saved.total
                return loss
            return super().compute_loss(*args, **kwargs)

    rows = 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    # From before the first weight, so that every allocation is in the trace.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        models = {"model": _model(config, dtype)} | ({"ref_model": _model(config, dtype)} if reference else {})
        trainer: Any = Counting(
            **models,
            args=args,
            train_dataset=Dataset.from_dict({name: values * rows for name, values in method.columns.items()}),
            data_collator=lambda examples: method.make_batch(trainer),
            processing_class=token_maker(),
            peft_config=peft_config,
            callbacks=[Watch(truth)],
        )
        begin = torch.zeros(7, dtype=torch.int16)  # 14 bytes: where training begins in the trace
        trainer.train()
        del begin
    truth.weights = parameter_bytes(trainer.model) + total_bytes(trainer.model.buffers())
    if args.gradient_checkpointing or "checkpoint" in (getattr(args, "lowmem_activations", None) or ""):
        # Rotary sines and cosines are arguments of every layer: the closures that run it again hold them, unhooked.
        heads = config.hidden_size // config.num_attention_heads
        truth.saved += 2 * args.max_length * heads * dtype.itemsize
    truth.peak = _peak(trace)
    return truth


def _peak(trace: Any) -> int:
    """The most bytes that torch's CPU allocator had given out at once, since training began."""
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = peak = 0
    begun = False
    for event in events:
        now += event.nbytes()
        begun = begun or event.nbytes() == 14
        peak = max(peak, now) if begun else 0
    assert begun
    return peak

"""Small models, and a real run of the real trainer on the CPU, weighed by others than the planner: autograd's
saved-tensor hooks, the tensors that model and optimizer hold, and the CPU allocator's own trace."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedConfig, TrainerCallback

from hf_lowmem.memory import gradient_bytes, measure_saved, optimizer_bytes
from hf_lowmem.memory.count import tensors_in, total_bytes
from hf_lowmem.planner.methods import method_of
from hf_lowmem.planner.models import token_maker
from hf_lowmem.training.sft import LowMemSFTConfig


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


class ResetPeak(TrainerCallback):
    """What was taken before the first step does not count."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.cuda.reset_peak_memory_stats()


def _model(
    config: PreTrainedConfig, dtype: torch.dtype, quantization: BitsAndBytesConfig | None, device: torch.device
) -> Any:
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    return (model if quantization is None else _quantized(model, quantization)).train()


def _quantized(model: Any, settings: BitsAndBytesConfig) -> Any:
    """The model with 4-bit linear layers, made by bitsandbytes itself. transformers' loader is passed by: on a CPU it
    holds on to the weights that it read."""
    options: dict[str, Any] = {
        "compress_statistics": settings.bnb_4bit_use_double_quant,
        "quant_type": settings.bnb_4bit_quant_type,
    }
    make: Any = Params4bit
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.lm_head:
            sizes = linear.in_features, linear.out_features, False
            small: Any = Linear4bit(*sizes, settings.bnb_4bit_compute_dtype, device="meta", **options)
            small.weight = make(linear.weight.detach(), False, module=small, **options).to(linear.weight.device)
            model.set_submodule(name, small)
    model.is_loaded_in_4bit = True
    return model


def _scales(model: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside its 4-bit weights."""
    return [t for p in model.parameters() for t in tensors_in(getattr(p, "quant_state", None))]


CPU = torch.device("cpu")


def trainer_of(
    config: PreTrainedConfig,
    args: Any,
    dtype: torch.dtype,
    *,
    callbacks: list[TrainerCallback],
    cls: Any = None,
    peft_config: Any = None,
    reference: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device = CPU,
) -> Any:
    """The trainer of a real model with random weights, and full batches for two steps. `cls`: None for the method's."""
    method = method_of(args)
    names = ("model", "ref_model")[: 1 + reference]
    rows = 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    make_batch = lambda examples: method.make_batch(trainer)  # noqa: E731
    flat = getattr(args, "padding_free", False) or getattr(args, "packing", False)
    trainer: Any = (cls or method.trainer)(
        **{name: _model(config, dtype, quantization, device) for name in names},
        args=args,
        train_dataset=Dataset.from_dict({name: values * rows for name, values in method.columns.items()}),
        data_collator=None if flat else make_batch,  # TRL refuses one under packing
        processing_class=token_maker(),
        peft_config=peft_config,
        callbacks=callbacks,
    )
    if flat:
        trainer.data_collator = make_batch
    return trainer


def measure(config: PreTrainedConfig, args: Any, dtype: torch.dtype, **options: Any) -> Truth:
    """Two steps of full batches, as the planner takes; `options`: peft_config, reference, quantization."""
    truth = Truth()

    class Counting(method_of(args).trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 0:  # hooks keep Python objects alive a little longer; the peak is step 2's
                with measure_saved(self.model) as saved:
                    loss = super().compute_loss(*args, **kwargs)
                    truth.saved = saved.total
                return loss
            return super().compute_loss(*args, **kwargs)

    # From before the first weight, so that every allocation is in the trace.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        trainer = trainer_of(config, args, dtype, cls=Counting, callbacks=[Watch(truth)], **options)
        begin = torch.zeros(7, dtype=torch.int16)  # 14 bytes: where training begins in the trace
        trainer.train()
        del begin
    truth.weights = total_bytes([*trainer.model.parameters(), *trainer.model.buffers(), *_scales(trainer.model)])
    tiers = getattr(args, "lowmem_activations", None) or ""
    if args.gradient_checkpointing or "checkpoint" in tiers or "stream" in tiers:
        # Rotary sines and cosines are arguments of every layer: the closures that run it again hold them, unhooked.
        text: Any = config.get_text_config()
        heads = text.hidden_size // text.num_attention_heads
        truth.saved += 2 * args.max_length * heads * dtype.itemsize
    truth.peak = peak_of(trace)
    return truth


def peak_of(trace: Any) -> int:
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

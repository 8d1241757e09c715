"""The real trainer, taking two steps on nothing.

The trainer's own code runs from `train()` to its end: TRL's fused head, its loss, PEFT's wrapping, checkpointing,
converted layers, accelerate's autocast and clipping, the optimizer and its state. Nothing of it is repeated here, so
nothing can be forgotten; what is exchanged is the batch, whose tensors are fake as all others, and what would write
files.

Two steps, because the first one has no optimizer state yet while it runs forward and backward, and two micro-batches
where gradients are accumulated, because from the second on gradients are alive in the forward pass. More of either
would repeat the last.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate.state import PartialState
from datasets import Dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer import dpo_trainer

from hf_lowmem.activations.detect import find_stack
from hf_lowmem.memory.count import tensors_in
from hf_lowmem.optim import ALL_METHODS, StepInBackward, base, chunked
from hf_lowmem.optim.accumulator import CODES, SCALE
from hf_lowmem.optim.state import WINDOW
from hf_lowmem.planner.accelerator import as_on_accelerator, as_on_cpu, as_with_real_tensors
from hf_lowmem.planner.again import logged_once
from hf_lowmem.planner.allocations import INSTEAD, CannotSimulate, Live
from hf_lowmem.planner.four_bit import state_of
from hf_lowmem.planner.models import Shape, make_model, shapes_of, token_maker
from hf_lowmem.planner.quiet import quiet
from hf_lowmem.preference.sharing import check
from hf_lowmem.training import multiplying
from hf_lowmem.training.head import GATHERED
from hf_lowmem.training.presets import AUTO
from hf_lowmem.weights import at_rest

__all__ = [
    "EVALUATION",
    "IMPLEMENTATIONS",
    "MICRO_BATCHES",
    "STEPS",
    "Measured",
    "quiet",
    "simulate_step",
    "weighed",
    "weighed_args",
]

EVALUATION = "evaluation"  # the phase of a step in which a batch of the evaluation set is run
STEPS = 2
MICRO_BATCHES = 2
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


@dataclass
class Measured:
    """A log of storages, and which rows of it are what."""

    live: Live
    weights: set[int] = field(default_factory=set)
    reference: set[int] = field(default_factory=set)
    gradients: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    vocabulary: int = 0
    stack: str = ""  # name of the list of decoder layers
    start: int = 0  # clock at the first step's beginning
    end: int = 0
    shapes: list[Shape] = field(default_factory=list)


def sums_of(states: Iterable[Mapping[str, object]]) -> Iterator[torch.Tensor]:
    """Sums of gradients that optimizer states hold within a window of gradient accumulation."""
    for raw in states:
        yield from tensors_in({name: value for name, value in raw.items() if name in (WINDOW, CODES, SCALE)})


class Seen:
    """A hook that notes a parameter's gradient, if it comes whole."""

    only_looks = True  # so an output head's may come by blocks all the same

    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    def __call__(self, grad: torch.Tensor | None) -> None:
        if grad is not None:
            self.measured.gradients |= self.measured.live.rows_of([grad])


class Phases(TrainerCallback):
    """Tells the log where in the step the trainer is, and what has become of the storages by then."""

    def __init__(self, measured: Measured, evaluate: Callable[[], Any] | None, steps: int) -> None:
        self.measured, self.live, self.evaluate, self.steps = measured, measured.live, evaluate, steps

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.measured.start:
            self.measured.start = self.live.clock
        self.live.phase("forward")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        model: Any = kwargs["model"]
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        self.measured.gradients |= self.live.rows_of(grads)
        self.live.phase("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.live.phase("end")
        states = kwargs["optimizer"].state.values()
        self.measured.states |= self.live.rows_of(t for state in states for t in tensors_in(state))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        state: Any = args[1]
        if state.global_step == self.steps and self.evaluate is not None:
            self.live.phase(EVALUATION)
            self.evaluate()
        self.measured.end = self.live.clock


class Batches:
    """A data loader that makes each batch when it is asked for, as a loader does that moves batches to a device."""

    def __init__(self, measured: Measured, method: Any, trainer: Any) -> None:
        self.measured, self.make = measured, partial(method.make_batch, trainer)
        self.count = STEPS * trainer.args.gradient_accumulation_steps

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.count):
            batch = self.make()
            self.measured.inputs |= self.measured.live.rows_of(tensors_in(batch))
            yield batch


def weighed(method: Any, measured: Measured, implementation: str | None) -> type:
    """The method's trainer, taking full batches and telling `measured` what it does."""
    live = measured.live

    class Weighed(method.trainer):
        reports = False  # fake tensors have nothing to measure

        def get_train_dataloader(self) -> Any:
            return Batches(measured, method, self)

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # a pass before training; the batches have what it computes

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            _choose(optimizer, implementation, self.args)
            self._declare()
            return optimizer

        def _declare(self) -> None:
            model: Any = self.model
            live.watch(model)
            measured.weights |= live.rows_of([*model.parameters(), *model.buffers()])
            measured.weights |= live.rows_of(t for p in model.parameters() for t in state_of(p))
            measured.weights |= live.rows_of(
                t for p in model.parameters() if (kept := at_rest(p)) for t in kept.stored()
            )
            reference = getattr(self, "ref_model", None)
            if isinstance(reference, nn.Module):
                live.watch(reference, "reference: ")
                measured.reference |= live.rows_of([*reference.parameters(), *reference.buffers()])
            measured.stack = find_stack(model)[0]
            measured.vocabulary = model.get_output_embeddings().weight.shape[0]
            measured.shapes = shapes_of(model, measured.stack)
            for p in model.parameters():
                if p.requires_grad:
                    p.register_hook(Seen(measured))

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if not self.model.training:
                return super().compute_loss(*args, **kwargs)
            live.phase("forward")
            loss = super().compute_loss(*args, **kwargs)
            if torch.is_grad_enabled():  # a method of zeroth order has no backward pass
                live.phase("backward")
            return loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.optimizer is not None:
                measured.gradients |= live.rows_of(sums_of(self.optimizer.state.values()))
            live.phase("clipping")
            return loss

        def evaluate_once(self) -> None:
            """A full batch of evaluation, between two steps."""
            modes = {part: part.training for part in self.model.modules()}
            self.model.eval()
            batch = method.make_batch(self, evaluation=True)
            measured.inputs.update(live.rows_of(tensors_in(batch)))
            self.prediction_step(self.model, batch, prediction_loss_only=True)
            for part, training in modes.items():
                part.training = training

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("a simulated run writes nothing")

    return Weighed


def _choose(optimizer: Any, implementation: str | None, args: Any) -> None:
    if implementation is None:
        return
    for group in optimizer.param_groups:
        if "foreach" not in group:
            raise ValueError(
                f"implementation={implementation!r} has no effect with optim={args.optim!r}, which has one "
                "implementation only. Leave it unset."
            )
        group |= IMPLEMENTATIONS[implementation]


def weighed_args(args: Any, folder: str, steps: int = STEPS) -> Any:
    """A copy of the arguments for a run of two steps that writes nothing, on the CPU."""
    args = copy.copy(args)
    changes: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "gradient_accumulation_steps": min(args.gradient_accumulation_steps, MICRO_BATCHES),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "do_eval": False,
        "load_best_model_at_end": False,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "push_to_hub": False,
        "auto_find_batch_size": False,
        "full_determinism": False,
        "use_cache": False,
        "model_init_kwargs": None,
        "fsdp": type(args.fsdp)() if not isinstance(args.fsdp, bool) else False,
        # All tokens of a planned batch are trained on, and the data set of one row has no turns to choose from.
        "assistant_only_loss": False,
        "completion_only_loss": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "chat_template_path": None,
        "eos_token": None,
        "ref_model_sync_steps": 1,  # what happens now and then happens in each of the two steps
        "lowmem_budget": None,  # this is what a search runs
        "lowmem_schedule": None,  # of two steps, in which nothing is learned
        "lr_scheduler_kwargs": None if getattr(args, "lowmem_schedule", None) else args.lr_scheduler_kwargs,
        "lowmem": None if getattr(args, "lowmem", None) == AUTO else getattr(args, "lowmem", None),
        # A projection's refresh is the step's heaviest moment: let it happen when all states are there, too.
        "lowmem_update_gap": 1 if "update_gap" in getattr(ALL_METHODS.get(args.optim), "DEFAULTS", {}) else None,
    }
    for name, value in changes.items():
        if hasattr(args, name):
            setattr(args, name, value)
    vars(args)["_setup_devices"] = torch.device("cpu")
    args._n_gpu = 0
    args.distributed_state = PartialState(cpu=True)
    return args


def _some_of(parts: Sequence[chunked.Part]) -> list[chunked.Part]:
    """The first two and the last part of a long parameter: those between are as large, so they take as much."""
    return [*parts[:2], *parts[2:][-1:]]


def simulate_step(
    config: PreTrainedConfig,
    args: Any,
    method: Any,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    accelerator: bool = True,
    implementation: str | None = None,
    peft_config: Any = None,
    quantization: Any = None,
    gathered: bool = False,
    steps: int = STEPS,
) -> Measured:
    """Run the trainer's steps on fake tensors; see the module. `method`: one of `hf_lowmem.planner.methods.METHODS`;
    `gathered`: as a process under FSDP2 does, whose output head is a copy that is gathered for each pass; `steps`: one
    is enough for an optimizer that keeps nothing.

    Raises:
        CannotSimulate: naming the operation and the module, where what the step does depends on values; with the
            reason, where the step fails.
    """
    # sdpa and eager attention keep documents apart by a mask; the kernels that sdpa may stand for need none.
    masks = attention in (None, "sdpa", "eager")
    live = Live(invent_numbers=True, documents=masks and method.has_documents(args))
    measured = Measured(live)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run = weighed_args(args, folder, steps)
        stack.enter_context(as_with_real_tensors())
        stack.enter_context(as_on_accelerator() if accelerator else as_on_cpu())
        stack.enter_context(mock.patch.object(check, "sharing_error", return_value=(0.0, 0.0)))  # tried by numbers
        # A reference is loaded from where the policy came from, which here is its config; and nothing can be hashed.
        reference = lambda *args, **kwargs: make_model(config, dtype, attention).eval()  # noqa: E731
        stack.enter_context(mock.patch.object(dpo_trainer, "create_model_from_path", reference))
        stack.enter_context(mock.patch.object(dpo_trainer, "hash_module", return_value="unknown"))
        stack.enter_context(mock.patch.object(chunked, "each_of", _some_of))
        stack.enter_context(mock.patch.object(base, "step_by_loop", logged_once(base.step_by_loop, live)))
        if gathered:
            stack.enter_context(mock.patch.object(StepInBackward, "whole_only", return_value=GATHERED))
            stack.enter_context(mock.patch.object(multiplying, "whole_under", return_value="frozen, and sharded"))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, live:
            model = make_model(config, dtype, attention, quantization)
            cls = weighed(method, measured, implementation)
            trainer = method.make(cls, model, run, peft_config, Dataset.from_dict(method.data(args)), token_maker())
            trainer.remove_callback(PrinterCallback)
            evaluates = args.eval_on_start or str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
            trainer.add_callback(Phases(measured, trainer.evaluate_once if evaluates else None, steps))
            try:
                trainer.train()
            except CannotSimulate:
                raise
            except RuntimeError as error:
                raise CannotSimulate(
                    f"a step of these settings fails without memory, and probably with it: {error} Try a step in "
                    f"training; if it works there: {INSTEAD}"
                ) from error
            measured.end = live.clock
    return measured

"""The torch optimizer that every method is: parameters, groups, checkpoints, counts. No mathematics of any method.

`step()` does with each parameter what `step_param(p, group)` does with one, which is what a backward hook calls. Either
asks for the parameter's slot, in which all decisions are taken already, and hands both to the loop or to a kernel.

Why not torchao's tensor subclasses, where `exp_avg` is an 8-bit tensor that decodes itself: every subclass has to be
taught to DTensor, to `torch.load(weights_only=True)` and to `Optimizer.load_state_dict`. Here the state of a parameter
is a flat dict of plain tensors: `{"step": int64, "exp_avg.codes": uint8, "exp_avg.scale": fp32, ...}`.

    method      what a method says of itself
    state       declarations of states, and their whole numbers
    slot        what is decided once for a parameter
    sharded     the same, of weights that FSDP2 has cut
    stepping    a step by decoding, `update` and encoding
    chunked     the same of long parameters, a chunk at a time
    row_steps   the same of a matrix whose gradient comes a block of rows at a time
    accumulator gradients of several backward passes, added up in int8
    fused       kernels that do a whole step
    guard       what is not finite is left out, and counted
    checkpoint  states loaded without torch's casts
    options     what a parameter group holds, from a spec and a method's defaults
    placement   engines that flatten weights
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.distributed import is_sharded, local
from hf_lowmem.kernels import current_impl
from hf_lowmem.optim import accumulator
from hf_lowmem.optim.cautious import warn_slower
from hf_lowmem.optim.checkpoint import load
from hf_lowmem.optim.fused import is_plain, kernel_runs, step_fused, warn_unfused
from hf_lowmem.optim.guard import SkipCount, Skipped, stays_finite
from hf_lowmem.optim.method import Method
from hf_lowmem.optim.names import without_wrappers
from hf_lowmem.optim.options import plain, resolve, with_rate
from hf_lowmem.optim.placement import check_flattened, check_placement
from hf_lowmem.optim.row_steps import RowStep
from hf_lowmem.optim.sharded import ShardedSlot, agreed
from hf_lowmem.optim.slot import FLOATS, Slot
from hf_lowmem.optim.state import Group
from hf_lowmem.optim.stepping import step_by_loop
from hf_lowmem.specs import STORES_AT_REST, OptimSpec
from hf_lowmem.weights import at_rest


class LowMemOptimizer(Method, Optimizer):
    """Base class of all optimizers: encoded states, stored weights, one step per parameter.

    ```python
    optimizer = AdamW(model.named_parameters(), lr=1e-4, state="int8")
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    ```

    Args:
        params: as for any torch optimizer; `named_parameters()` or groups of such where a method draws random numbers,
            whose stream is derived from the parameter's name. Without names, from shape and position.
        lr, betas, eps, weight_decay, state, weights, rank, update_gap, scale, projection, rotate, embeddings, seed: see
            `OptimSpec`; they may also be set per group. An option that means nothing to the method is refused.
        **options: what this method alone understands; see its docstring.

    A gradient with a NaN, an Inf or a magnitude above 1e15 leaves its parameter's weights and moments as they were, and
    so does an update that is not finite; the step still counts. `skipped()` says how often. Sparse and complex
    gradients are refused. Gradients and moments are fp32; a parameter in float64 keeps its precision.

    Raises:
        TypeError, ValueError: naming the option, its value, the reason and the remedy.
    """

    # Shapes of the parameters that it was made for; a copy or an unpickled one does not know them.
    _shapes: set[torch.Size] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        state: str = "fp32",
        weights: str = "keep",
        rank: int | None = None,
        update_gap: int | None = None,
        scale: float | None = None,
        projection: str | None = None,
        rotate: bool | None = None,
        embeddings: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        spec = OptimSpec(
            name=self.name,
            lr=plain(lr),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state=state,
            weights=weights,
            rank=rank,
            update_gap=update_gap,
            scale=scale,
            projection=projection,
            rotate=rotate,
            embeddings=embeddings,
            seed=seed,
            options=options,
        )
        self._slots, self._skip_count = {}, None
        super().__init__(params, self.resolve(spec) | {"lr": lr})
        for group in self.param_groups:
            check_store(spec.label("weights"), group["weights"], (p for g in self.param_groups for p in g["params"]))

    @classmethod
    def resolve(cls, spec: OptimSpec) -> Group:
        """The options of a parameter group: what the spec says, the method's defaults for the rest.

        Raises:
            ValueError: for an unknown codec or option, or an option that would do nothing for this method.
        """
        return resolve(cls, spec)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Forget all decisions: this is a copy, an unpickled optimizer, or one into which a checkpoint is loaded."""
        self._slots: dict[int, Slot] = {}
        self._skip_count: SkipCount | None = None  # it begins anew with what the first group says
        super().__setstate__(state)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as in torch; its own options are checked like the constructor's."""
        resolved = self._resolved(self.defaults | param_group)
        own = {k: resolved[k] for k in param_group if k in resolved and k not in ("lr", "rank")}
        super().add_param_group(param_group | own)
        group = self.param_groups[-1]
        if "param_names" in group:
            group["param_names"] = without_wrappers(group["param_names"])
        self._shapes = {p.shape for g in self.param_groups for p in g["params"]}
        for p in group["params"]:
            check_placement(self, p, group)
            if p.is_complex():
                raise TypeError(f"a parameter of dtype {p.dtype}: {self.name} needs real ones; use torch.view_as_real.")
            if p.requires_grad and p.dtype not in (*FLOATS, torch.float64):
                raise TypeError(
                    f"a parameter of dtype {p.dtype}: {self.name} trains bfloat16, float16, float32 and float64. Load "
                    "the model in one of them, or set requires_grad=False."
                )

    def _resolved(self, options: Group) -> Group:
        """A group's options, checked as the constructor's are; what else it holds is left out."""
        fields = {f.name for f in dataclasses.fields(OptimSpec)} - {"name", "options", "labels"}
        asked = {k: plain(v) if k == "lr" else v for k, v in options.items() if k in fields}
        own = {k: options[k] for k in (*self.CHECKS, *self.FACTS)}
        return self.resolve(OptimSpec(name=self.name, options=own, **asked))

    def slot(self, p: Tensor, group: Group) -> Slot:
        """The slot of a parameter: what is decided for it, and its state as it is now, to read between steps.

        It is made anew where the parameter or the group's options are not what they were. Looking at a state that does
        not exist yet makes none.
        """
        slot = self._slot(p, group)
        slot.open(self.state.get(p, {}))
        return slot

    def _slot(self, p: Tensor, group: Group, options: tuple[Any, ...] | None = None) -> Slot:
        """See `slot`. `options`: `_options(group)`, where it is known."""
        cut = (p.device_mesh, p.placements) if is_sharded(p) else None
        facts = p.shape, p.dtype, p.device, cut, at_rest(p), self._options(group) if options is None else options
        known = self._slots.get(id(p))
        if known is not None and known.group is group and known.facts == facts:
            return known
        check_placement(self, p, group)
        check_flattened(self, p, group, self._shapes)
        kind = Slot if cut is None else ShardedSlot
        reach, rule = self.reach(p.shape, group), self.rule(p.shape, group)
        new = kind(p, group, self.STATES, reach=reach, rule=rule, groups=self.param_groups)
        new.facts = facts
        self._slots[id(p)] = new
        return new

    def _options(self, group: Group) -> tuple[Any, ...]:
        """The options of a group on which the decisions of its slots depend."""
        return *map(group.get, ("experts", "cautious", *self.FACTS)), *map(group.get, self.STRUCTURAL)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_stepped(group)
        self._update([(group, self._entries(group, group["params"])) for group in self.param_groups])
        self._skips.end_step()
        return loss

    def step_param(self, p: Tensor, group: Group, *, norm: Tensor | None = None) -> None:
        """Update one parameter from its `.grad`, as `step()` does each; a backward hook calls this.

        Of a sharded parameter all processes call it, in the same order of parameters.

        Args:
            norm: of the gradient, in fp32 on its device, where it is known: a small one has no bad values to look for.
        """
        if torch.is_grad_enabled():  # not in a hook, for which entering `no_grad` would be a tenth of its time
            with torch.no_grad():
                self.step_param(p, group, norm=norm)
            return
        self._update([(group, self._entries(group, [p]))], norm)

    @torch.no_grad()
    def step_rows(self, p: Tensor, group: Group, finite: Tensor) -> RowStep:
        """Begin a step of a matrix whose gradient comes by rows. See hf_lowmem/optim/row_steps.py, for arguments too.

        Raises:
            ValueError: for a learning rate that is no number.
        """
        slot = self._slot(p, group)
        slot.open(self.state[p])
        return RowStep(self, p, slot, with_rate(group), finite, self._skips, self._fuses)

    @torch.no_grad()
    def accumulate_param(self, p: Tensor, group: Group, *, coded: bool = False) -> bool:
        """Take up `p.grad` into the state, ahead of the last gradient of a window. False: keep the gradient instead.

        Args:
            coded: whether what the method cannot add up by itself is added up in int8: hf_lowmem/optim/accumulator.py.
        """
        assert p.grad is not None
        check_dense(self.name, p.grad)
        slot = self._slot(p, group)
        own = self.ACCUMULATES and slot.low_rank and not group.get("cautious")  # which needs the sum itself
        if not (own or (coded and accumulator.takes(slot))):
            return False
        slot.open(self.state[p])
        if own:
            self.accumulate(local(p.grad).to(torch.float32), slot, group)
        else:
            accumulator.add(p.grad, slot)
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients as in torch, and sums of gradients that are in the state."""
        for raw in self.state.values():
            accumulator.forget(raw)
        super().zero_grad(set_to_none)

    def _entries(self, group: Group, params: Iterable[Tensor]) -> list[tuple[Tensor, Slot]]:
        """The parameters of a group that have values and a gradient, each with its slot, opened for an update."""
        options = self._options(group)
        found: list[tuple[Tensor, Slot]] = []
        for p in params:
            grad = p.grad
            if accumulator.is_open(self.state.get(p)):
                raise RuntimeError(accumulator.LEFT)
            if grad is not None and p.numel():
                check_dense(self.name, grad)
                slot = self._slot(p, group, options)
                slot.open(self.state[p])
                found.append((p, slot))
        return found

    def _update(self, work: list[tuple[Group, list[tuple[Tensor, Slot]]]], norm: Tensor | None = None) -> None:
        """One step of all these, each by the kernel or by the loop. `norm`: of the only gradient, where it is known."""
        work = [(with_rate(group), entries) for group, entries in work if entries]
        cut = [(p, slot) for _, entries in work for p, slot in entries if isinstance(slot, ShardedSlot)]
        finite = dict(zip([p for p, _ in cut], agreed(cut), strict=True)) if cut else {}
        runs: dict[tuple[object, ...], bool] = {}
        for group, entries in work:
            fused: list[tuple[Tensor, Slot]] = []
            matrices: list[tuple[Tensor, Slot]] = []
            for p, slot in entries:
                if self._fuses(p, slot, group, runs):
                    fused.append((p, slot))
                elif slot.low_rank and self.steps_together(p, slot, group, runs):
                    matrices.append((p, slot))
                else:
                    step_by_loop(self, p, slot, group, self._skips, finite.get(p))
            if self.FUSED is not None:
                step_fused(self.FUSED, fused, group, self._skips.on, norm)
            if matrices:
                self.step_together(matrices, group, self._skips.on)

    def _fuses(self, p: Tensor, slot: Slot, group: Group, runs: dict[tuple[object, ...], bool]) -> bool:
        """Whether `FUSED` makes this parameter's step. `runs`: of which kinds the kernel does, filled here."""
        if self.FUSED is None or not slot.elementwise:
            if self.FUSED is not None and group.get("cautious") and kernel_runs(self.FUSED.kernel, p):
                warn_slower(self.name)
            return False
        if slot.coded and not slot.dithers:  # kernels round every coded state at random
            return False
        assert p.grad is not None
        kind = slot.device, p.dtype, p.grad.dtype, slot.codec_names
        if kind not in runs:
            runs[kind] = kernel_runs(self.FUSED.kernel, p, slot.codec_names)
        fits = slot.fusable and is_plain(p)
        on_cpu = slot.device.type == "cpu" and current_impl() != "triton"
        if runs[kind] and not fits and not on_cpu:
            warn_unfused(self.name, p, slot)
        # A CPU may be asked, so there the loop leaves out what might not be finite.
        return fits and runs[kind] and (not on_cpu or (slot.syncs and stays_finite(p, slot, group)))

    def state_bytes(self, p: Tensor, group: Group) -> int:
        """Bytes of the tensors that the state of `p` takes here (predicted: nothing is allocated)."""
        return self._slot(p, group).nbytes()

    @property
    def _skips(self) -> SkipCount:
        if self._skip_count is None:  # of a copy or an unpickled one, too
            self._skip_count = SkipCount(Skipped(*self.param_groups[0].get("skipped", (0, 0, 0))))
        return self._skip_count

    def skipped(self) -> Skipped:
        """Counts of updates and steps that were left out: a bad gradient, or an update that was not finite.

        Asks the device. Under FSDP2 it is this process's number, which may differ by updates that were not finite.
        """
        return self._skips.read()

    def state_dict(self) -> dict[str, Any]:
        """The state as in torch; updates that were left out are counted in the first group, as `skipped`."""
        found = self.skipped()
        if any(found):
            self.param_groups[0]["skipped"] = list(found)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in torch, except that each tensor keeps its own dtype.

        Raises:
            ValueError: where the checkpoint was made by another method, codec, rank, projection or seed, or with the
                parameters in another order; and where a state does not fit its parameter, or a setting no optimizer.
        """
        load(self, self._slot, self._resolved, self.STRUCTURAL, state_dict, super().load_state_dict)


def check_dense(name: str, grad: Tensor) -> None:
    """Raise for a sparse gradient."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} needs dense gradients, got {grad.layout}. Use nn.Embedding(sparse=False).")


def check_stepped(group: Group) -> None:
    """Raise where a weight at rest still has its gradient at the end of a backward pass."""
    if group["weights"] not in STORES_AT_REST or group["lr"] == 0:  # by which torch's checkpoints have states made
        return
    kept = next((kept for p in group["params"] if p.grad is not None and (kept := at_rest(p)) is not None), None)
    if kept is not None:
        raise RuntimeError(
            f"weights={group['weights']!r} needs a step in backward, and {kept.name} has a gradient that was not "
            "stepped: all of them take 2 bytes a weight, twice what the weights do. Make "
            "hf_lowmem.optim.StepInBackward(optimizer) before the first backward pass, or set weights='bf16_sr'."
        )


LOAD_BF16 = (
    "Load the model with dtype=torch.bfloat16 (where a trainer loads it by its name: "
    'model_init_kwargs={"dtype": "bfloat16"}; on the command line: --dtype bfloat16), or leave it unset.'
)


def check_store(label: str, store: str, parameters: Iterable[Tensor], *, adapters: bool = False) -> None:
    """Raise where a store for bf16 weights would meet none.

    Args:
        adapters: whether PEFT's adapters are what is trained, whatever the model's own weights are.
    """
    parameters = list(parameters)
    dtypes = {p.dtype for p in parameters}
    if store in STORES_AT_REST and not any(map(at_rest, parameters)):
        raise ValueError(
            f"{label}={store!r} is for a model, whose layers decode the weights, and not for bare parameters. Make the "
            "optimizer with hf_lowmem.make_optimizer(name, model, ...)."
        )
    if store != "keep" and torch.bfloat16 not in dtypes:
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        if adapters:
            raise ValueError(
                f"{label}={store!r} has no effect: it is for weights that are trained, and those are PEFT's adapters, "
                f"which PEFT keeps in {found} beside weights of any dtype. Leave it unset; or make the adapters in "
                "bfloat16: get_peft_model(model, config, autocast_adapter_dtype=False)."
            )
        raise ValueError(f"{label}={store!r} has no effect: no parameter is bfloat16 (found: {found}). {LOAD_BF16}")

"""The loop that every optimizer shares: state, codecs, checkpoints, bad gradients. No mathematics of any method.

`step()` does with each parameter what `step_param(p, group)` does with one, which is what a backward hook calls. A
method implements `update` on plain fp32 tensors and never sees a codec's bytes, a bf16 weight or a NaN. It may also
name a kernel that does the whole step, see optim/fused.py.

Why not torchao's tensor subclasses, where `exp_avg` is an 8-bit tensor that decodes itself: every subclass has to be
taught to DTensor, to `torch.load(weights_only=True)` and to `Optimizer.load_state_dict`. Here the state of a parameter
is a flat dict of plain tensors: `{"step": int64, "exp_avg.codes": uint8, "exp_avg.scale": fp32, ...}`.

    options    what a parameter group holds, from a spec and a method's defaults
    load       checkpoints, without torch's casts
    fused      kernels that do a whole step
    sharded    states of weights that FSDP2 has cut
    flat       groups that DeepSpeed makes one vector of
    parts      long parameters, a part at a time
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.codecs import StateCodec, codec_pair
from hf_lowmem.distributed import is_sharded, local
from hf_lowmem.kernels import Kernel
from hf_lowmem.kernels.step.reference import is_sound, load_weight, save_weight
from hf_lowmem.optim.flat import check_flattened
from hf_lowmem.optim.fused import FLOATS, can_store, kernels_run_on, step_fused
from hf_lowmem.optim.guard import SkipCount, Skipped, keep_or_take
from hf_lowmem.optim.load import load
from hf_lowmem.optim.names import stream_name, without_wrappers
from hf_lowmem.optim.options import plain, resolve, with_rate
from hf_lowmem.optim.parts import can_part, step_parts
from hf_lowmem.optim.sharded import ShardedState, agreed, agreed_for, coded_bytes
from hf_lowmem.optim.state import (
    CORRECTION,
    COUNT_BYTES,
    WINDOW,
    ParamState,
    StateDecl,
    count_step,
    stream_key,
    values_of,
)
from hf_lowmem.reasons import flattened
from hf_lowmem.specs import OptimSpec

# Decided from a parameter's whole size, never from a shard's: one model has one layout on any number of devices.
SMALLEST_COMPRESSED = 4096


class LowMemOptimizer(Optimizer):
    """Base of every optimizer of the house.

    ```python
    optimizer = AdamW(model.named_parameters(), lr=1e-4, state="int8")
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    ```

    Args:
        params: as for any torch optimizer; `named_parameters()` or groups of such where a method draws random numbers,
            whose stream is derived from the parameter's name. Without names, from shape and position.
        lr, betas, eps, weight_decay, state, weights, rank, update_gap, scale, projection, rotate, seed: see `OptimSpec`
            and may also be set per group. An option that means nothing to the method is refused.
        **options: what this method alone understands; see its docstring.

    A gradient with a NaN, an Inf or a magnitude above 1e15 leaves its parameter's weights and moments as they were, and
    so does an update that is not finite; the step still counts. `skipped()` says how often. Sparse and complex
    gradients are refused. Gradients and moments are fp32; a parameter in float64 keeps its precision.

    Raises:
        TypeError, ValueError: naming the option, its value, the reason and the remedy.
    """

    name: ClassVar[str]
    STATES: ClassVar[dict[str, StateDecl]]
    # Options whose default is the method's own. An option that is absent here means nothing to the method.
    DEFAULTS: ClassVar[dict[str, Any]]
    # Of those, the ones that OptimSpec does not know, each with a function (label, value) that raises if it is bad.
    CHECKS: ClassVar[dict[str, Callable[[str, Any], None]]] = {}
    # The projections that make sense for the method, if it projects.
    PROJECTIONS: ClassVar[tuple[str, ...]] = ()
    # Whether gradients can be added up without keeping them; see `fold`.
    ACCUMULATES: ClassVar[bool] = False
    # Whether the update of each value needs that value alone, so that weights may be flattened; see rules/deepspeed.py.
    ELEMENTWISE: ClassVar[bool] = False
    # The kernel that makes a whole step of a parameter, for those that `fuses` names; see optim/fused.py.
    FUSED: ClassVar[Kernel | None] = None
    # Options that decide what the state looks like: a checkpoint made with others cannot be continued.
    STRUCTURAL: ClassVar[tuple[str, ...]] = ("method", "state", "weights", "rank", "projection", "seed")

    # Of the parameters that it was made for; a copy or an unpickled one does not know them.
    _shapes: set[torch.Size] | None = None
    _skip_count: SkipCount | None = None

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
            seed=seed,
            options=options,
        )
        super().__init__(params, self.resolve(spec) | {"lr": lr})
        for group in self.param_groups:
            check_store(spec.label("weights"), group["weights"], (p for g in self.param_groups for p in g["params"]))

    @classmethod
    def resolve(cls, spec: OptimSpec) -> dict[str, Any]:
        """The options of a parameter group: what the spec says, the method's defaults for the rest.

        Raises:
            ValueError: for an unknown codec or option, or an option that would do nothing for this method.
        """
        return resolve(cls, spec)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's own options are checked like the constructor's."""
        fields = {f.name for f in dataclasses.fields(OptimSpec)} - {"name", "options", "labels"}
        merged = {**self.defaults, **param_group}
        merged["lr"] = plain(merged["lr"])
        resolved = self.resolve(
            OptimSpec(
                name=self.name,
                **{k: v for k, v in merged.items() if k in fields},
                options={k: merged[k] for k in self.CHECKS},
            )
        )
        own = {k: resolved[k] for k in param_group if k in resolved and k not in ("lr", "rank")}
        super().add_param_group(param_group | own)
        group = self.param_groups[-1]
        if "param_names" in group:
            group["param_names"] = without_wrappers(group["param_names"])
        self._shapes = {p.shape for g in self.param_groups for p in g["params"]}
        for p in group["params"]:
            self.check_placement(p, group)
            if p.is_complex():
                raise TypeError(f"a parameter of dtype {p.dtype}: {self.name} needs real ones; use torch.view_as_real.")
            if p.requires_grad and p.dtype not in (*FLOATS, torch.float64):
                raise TypeError(
                    f"a parameter of dtype {p.dtype}: {self.name} trains bfloat16, float16, float32 and float64. Load "
                    "the model in one of them, or set requires_grad=False."
                )

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
        sound = agreed(self)
        for group in self.param_groups:
            check_flattened(self, self._shapes, group)
            together = []
            for p in group["params"]:
                if p.grad is not None:
                    if self.fuses(p, group):
                        together.append(p)
                    else:
                        self._step_loop(p, group, sound.get(p))
            step_fused(self, together, group)
        self._skips.end_step()
        return loss

    @property
    def _skips(self) -> SkipCount:
        if self._skip_count is None:  # of a copy or an unpickled one, too
            self._skip_count = SkipCount(Skipped(*self.param_groups[0].get("skipped", (0, 0, 0))))
        return self._skip_count

    def skipped(self) -> Skipped:
        """How many updates and steps were left out, because of a bad gradient or of an update that was not finite.

        Asks the device. Under FSDP2 it is this process's number, which may differ by updates that were not finite.
        """
        return self._skips.read()

    def state_dict(self) -> dict[str, Any]:
        """As in torch; updates that were left out are counted in the first group, as `skipped`."""
        found = self.skipped()
        if any(found):
            self.param_groups[0]["skipped"] = list(found)
        return super().state_dict()

    @torch.no_grad()
    def fold_param(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Take up `p.grad` into the state, ahead of the last gradient of a window. False: keep the gradient instead."""
        assert p.grad is not None
        return self.fold(local(p.grad).to(torch.float32), self._state_of(p, group), group)

    def fold(self, grad: Tensor, state: ParamState, group: dict[str, Any]) -> bool:
        """Add to `state.raw[WINDOW]` what `update` needs of a gradient that is not the last of its window."""
        return False

    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any], sound: Tensor | None = None) -> None:
        """Update one parameter from its `.grad`, as `step()` does each; a backward hook calls this.

        Of a sharded parameter all processes call it, in the same order of parameters. `sound`: whether the gradient is
        good on all of them, where that is known already.
        """
        if self.fuses(p, group):
            step_fused(self, [p], group)
        else:
            self._step_loop(p, group, sound)

    def _step_loop(self, p: Tensor, group: dict[str, Any], sound: Tensor | None) -> None:
        """A step by decoding the state, `update`, and encoding it again."""
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise RuntimeError(
                f"{self.name} needs dense gradients, got {p.grad.layout}. Use nn.Embedding(sparse=False)."
            )
        if p.numel() == 0:
            return
        self.check_placement(p, group)
        group = with_rate(group)
        raw, waits = self.state[p], self._waits_for_the_device(p)
        count_step(raw)
        if not is_sharded(p) and self.elementwise(p, group) and can_part(p, self.codecs(p, group)):
            step_parts(self, p, group)
            return
        grad = local(p.grad).to(torch.float32)
        if sound is None and is_sharded(p):
            sound = agreed_for(p, raw)
        elif sound is None:
            sound = is_sound(grad)
            if WINDOW in raw:
                sound &= is_sound(raw[WINDOW])
        if waits and not sound and values_of(raw).keys() - {WINDOW}:
            raw.pop(WINDOW, None)  # and no update is made to be undone, but for the first, which allocates the states
        else:
            sound = keep_or_take(self, sound, p, grad, self._state_of(p, group), group)
        self._skips.add(sound, waits=waits)

    def elementwise(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the update of each of this parameter's values needs that value alone."""
        return self.ELEMENTWISE

    def fuses(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether `FUSED` makes this parameter's step."""
        return self.FUSED is not None and kernels_run_on(p, self.FUSED) and can_store(self.codecs(p, group))

    def fused_settings(self, group: dict[str, Any], steps: list[int]) -> tuple[Any, ...]:
        """The last arguments of `FUSED`, after tensors, codecs, store and seeds. `steps`: of each parameter."""
        raise NotImplementedError

    @staticmethod
    def _waits_for_the_device(p: Tensor) -> bool:
        """Whether reading a number from `p`'s device costs nothing, so that a bad gradient can simply be skipped."""
        return p.device.type == "cpu"

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> ParamState:
        make_key, waits = (lambda: self._stream_key(p, group)), self._waits_for_the_device(p)
        if is_sharded(p):
            batch = p.ndim == 3 and bool(group.get("experts") or group.get("rank"))
            return ShardedState(self.state[p], self.codecs(p, group), self.STATES, make_key, waits, p, batch)
        return ParamState(self.state[p], self.codecs(p, group), self.STATES, make_key, waits)

    def check_placement(self, p: Tensor, group: dict[str, Any]) -> None:
        """Raise for a parameter of FSDP1 or DeepSpeed, and for a sharded one that the method cannot treat."""
        if getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id"):
            engine = "DeepSpeed ZeRO" if hasattr(p, "ds_id") else "FSDP1"
            raise ValueError(f"{self.name} got a flattened parameter: {flattened(engine)}.")
        reason = self.unsharded_only(p.shape, group) if is_sharded(p) else None
        if reason is not None:
            raise ValueError(reason)

    @classmethod
    def unsharded_only(cls, shape: torch.Size, group: dict[str, Any]) -> str | None:
        """Why a parameter of this shape cannot be cut by rows (FSDP2), with the remedy. `None`: it can."""
        return None

    def _apply(self, p: Tensor, grad: Tensor, sound: Tensor, state: ParamState, group: dict[str, Any]) -> None:
        """Update `p` from a gradient that is sound, or will be undone. The one place where weights are read and written
        but for the kernels."""
        store = self.store_of(p, group)
        correction = seed = None
        if store == "bf16_ecc":
            correction = state.tensor(CORRECTION, lambda: torch.zeros_like(local(p), dtype=torch.int8))
        if store != "keep":
            seed = self.weight_seed(state)
        if self.writes_weights(p, group):
            self.update_weights(p, correction, seed, grad, sound, state, group)
            return
        p = local(p)
        weights = p if p.dtype == torch.float64 else load_weight(p, correction)
        first = state.first(p)
        self.update(weights, grad, state, group)
        save_weight(p, weights, correction, seed, first)

    @staticmethod
    def store_of(p: Tensor, group: dict[str, Any]) -> str:
        """How this parameter's weights are written: the stores are for bf16."""
        return group["weights"] if p.dtype == torch.bfloat16 else "keep"

    @staticmethod
    def weight_seed(state: ParamState) -> int:
        """Seed of this step's random rounding. Which of its numbers a value takes is its place in the parameter."""
        return stream_key(state.key, "weights", state.step)

    def writes_weights(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether `update_weights`, a kernel that reads and writes the weights, takes the place of `update`."""
        return False

    def update_weights(
        self,
        p: Tensor,
        correction: Tensor | None,
        seed: int | None,
        grad: Tensor,
        sound: Tensor,
        state: ParamState,
        group: dict[str, Any],
    ) -> None:
        """As `update`, on the stored weights, which must stay as they are where `sound`, on the device, is false."""
        raise NotImplementedError

    def update(self, p: Tensor, grad: Tensor, state: ParamState, group: dict[str, Any]) -> None:
        """Update `p` in place. `p` (fp32, or a parameter in fp64) and `grad` (fp32, finite) are of one shape."""
        raise NotImplementedError

    @staticmethod
    def codecs(p: Tensor, group: dict[str, Any]) -> tuple[StateCodec, StateCodec]:
        """What stores the signed and the unsigned states of this parameter."""
        return codec_pair(group["state"] if p.numel() >= SMALLEST_COMPRESSED else "fp32")

    def state_shapes(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
        """Shapes of the coded states of a parameter of `shape`."""
        return dict.fromkeys(self.STATES, shape)

    def plain_states(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
        """Shapes of the states of a parameter of `shape` that no codec stores: fp32, from its first update on."""
        return {}

    def draws(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether this parameter's updates draw random numbers, so that its state has a `key`."""
        return self.store_of(p, group) != "keep" or any(codec.name != "fp32" for codec in self.codecs(p, group))

    def state_bytes(self, p: Tensor, group: dict[str, Any]) -> int:
        """Bytes of the tensors that the state of `p` takes here (foretold: nothing is allocated)."""
        if is_sharded(p):
            moments = coded_bytes(self, p, group)
        else:
            codecs, shapes = self.codecs(p, group), self.state_shapes(p.shape, group)
            signed = {k: self.STATES[k].signed for k in shapes}
            moments = sum(codecs[0 if signed[k] else 1].nbytes(s.numel(), signed=signed[k]) for k, s in shapes.items())
        corrected = self.store_of(p, group) == "bf16_ecc"
        counts = 1 + self.draws(p, group) + is_sharded(p)
        return moments + (local(p).numel() if corrected else 0) + COUNT_BYTES * counts

    def to_rows(self, name: str, value: Tensor, shape: torch.Size, group: dict[str, Any]) -> Tensor:
        """A whole state of a parameter of `shape` with what is cut in front, as shards keep it."""
        return value

    def from_rows(self, name: str, value: Tensor, shape: torch.Size, group: dict[str, Any]) -> Tensor:
        """The inverse of `to_rows`."""
        return value

    def _stream_key(self, p: Tensor, group: dict[str, Any]) -> int:
        """Start of a parameter's random stream, 63 bits: a hash of the seed and its name (without names: its place)."""
        place = next(i for i, q in enumerate(group["params"]) if q is p)
        names = group.get("param_names")
        if not names:
            return stream_key(group["seed"], f"{tuple(p.shape)}#{place}")
        every = [name for g in self.param_groups for name in g["param_names"]]  # all groups have names, or none
        return stream_key(group["seed"], stream_name(names[place], every))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that each state keeps its own dtype.

        Raises:
            ValueError: where the checkpoint was made by another method, codec, rank, projection or seed, or with the
                parameters in another order; and where a state does not fit its parameter.
        """
        load(self, state_dict, super().load_state_dict)


def check_store(label: str, store: str, parameters: Iterable[Tensor]) -> None:
    """Raise where a store for bf16 weights would meet none."""
    dtypes = {p.dtype for p in parameters}
    if store != "keep" and torch.bfloat16 not in dtypes:
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(
            f"{label}={store!r} has no effect: no parameter is bfloat16 (found: {found}). Load the model with "
            "dtype=torch.bfloat16, or leave it unset."
        )

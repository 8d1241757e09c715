"""Zeroth order: what a backward pass would say, estimated from losses of forward passes at weights nearby.

With a random direction z and losses L+ and L- at w + eps z and w - eps z, the slope of the loss along z is
(L+ - L-) / 2 eps, one number, and slope * z is on average the gradient (of a loss smoothed over eps). No activation is
kept and no gradient exists. A direction is made anew wherever it is needed (draws.py), a pass at other weights leaves
the weights alone (perturb.py), and an update goes through the weight store and the codecs like any other method's.

What is known of a batch is a few losses, one for each point. So gradients accumulate exactly: losses of micro-batches
add up, and all micro-batches of a window see the same directions. And processes agree by a mean of these numbers,
whatever the size of the model.

Why not a gradient for a first-order optimizer in `.grad`: all of them at once would take what a backward pass takes.
Here the estimate of a part of a parameter is made, applied and dropped.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, NamedTuple, overload

import torch
from torch import Tensor, nn

from hf_lowmem.distributed import is_sharded, local, mean_over_processes
from hf_lowmem.kernels.spans import spans
from hf_lowmem.optim import slot as slots
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.chunked import allocate, can_cut, values_of_part
from hf_lowmem.optim.guard import keep_or_take
from hf_lowmem.optim.options import with_rate
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, stream_key
from hf_lowmem.optim.zeroth.draws import Along
from hf_lowmem.optim.zeroth.gathered import Gathered
from hf_lowmem.optim.zeroth.offload import Block, HostLayers, host_layers_of
from hf_lowmem.optim.zeroth.perturb import Substitution
from hf_lowmem.optim.zeroth.together import Together
from hf_lowmem.specs import OptimSpec

__all__ = ["Closure", "Point", "ZerothOrder", "shifted"]

# Of a slope: a direction's values are below 5, and what a method is handed stays below kernels' LARGEST_GRADIENT.
LARGEST_SLOPE = 1e14
Closure = Callable[[], Tensor | float]  # computes a loss
UNIT = 1 << 16  # values; the parts of a parameter begin at a multiple, so that blocks of codes are cut whole


class Point(NamedTuple):
    """Where a loss is asked for: `factor` perturbations from the weights along one probe's direction.

    `probe` None: at the weights themselves.
    """

    probe: int | None
    factor: float


class ZerothOrder(LowMemOptimizer):
    """Base class of methods that need no gradient. A rule says in `update` what it does with an estimate of it.

    ```python
    optimizer = make_optimizer("mezo", model, lr=1e-6)
    loss = optimizer.step(lambda: model(**batch).loss)          # two forward passes, no backward pass
    ```

    A window of several micro-batches: `optimizer.probe(lambda: loss / count)` for each, then `optimizer.step()`. With
    our trainers nothing else is to be written than `optim="mezo"`.

    Args:
        perturbation: eps, how far from the weights a loss is asked for.
        probes: directions of one update, whose estimates are averaged; each costs its forward passes.
        share: of the weights that move, 0.1 for a tenth: a fixed choice at random, by seed and name, which is made
            again wherever it is needed. Decay is of all weights.
        block_layers: so many layers move in a step, and then the next ones; what lies outside of layers is the last
            block. For methods without states.
        (others): see `LowMemOptimizer`.

    Raises:
        RuntimeError: in `step`, where a backward pass has left gradients, or where no loss was probed; in `probe`, for
            a loss in 16 bits.
    """

    DIRECTION: ClassVar[str] = "normal"
    ELEMENTWISE, GRADIENTS = True, False
    ACCUMULATES_LOSSES: ClassVar[bool] = True  # whether one window may have several micro-batches
    model: nn.Module | None = None  # a copy or an unpickled optimizer has none
    slopes: tuple[float, ...] = ()  # of the last update, along each direction
    _window: list[float] | None = None
    _substitution: Substitution | None = None
    _homes: dict[int, int] | None = None  # blocks of parameters, by id

    @classmethod
    def resolve(cls, spec: OptimSpec) -> Group:
        if not cls.STATES and spec.state != "fp32":
            raise ValueError(
                f"{spec.label('state')}={spec.state!r} has no effect with {spec.label('name')}={cls.name!r}, which "
                "keeps no state. Leave it unset."
            )
        if cls.STATES and spec.options.get("block_layers") is not None:
            raise ValueError(
                f"{spec.label('options')}: block_layers={spec.options['block_layers']!r} cannot be combined with "
                f"{spec.label('name')}={cls.name!r}: states of all blocks would be kept, and grow old, for the one "
                "that moves. Leave it out, or take a method without states, such as 'mezo'."
            )
        return super().resolve(spec)

    def of(self, model: nn.Module) -> "ZerothOrder":
        """The same optimizer, which probes this model; its parameters are the model's."""
        self.model, self._substitution, self._homes = model, None, None
        return self

    def points(self) -> list[Point]:
        """Where the loss is asked for in each micro-batch."""
        return [Point(probe, factor) for probe in range(self.probes) for factor in (1.0, -1.0)]

    def differences(self, losses: list[float]) -> list[float]:
        """Shares of the probes in the estimate, times the perturbation; from the losses at `points`."""
        return [(losses[2 * i] - losses[2 * i + 1]) / (2 * self.probes) for i in range(self.probes)]

    @property
    def probes(self) -> int:
        """Number of directions of an update."""
        return self._agreed_option("probes") or 1

    def probe(self, closure: Closure) -> float:
        """Ask for the loss of a micro-batch at each point; the mean of what was found.

        Args:
            closure: computes a loss, in forward passes alone; it is called once for each point, with torch's random
                numbers at the same state, so that dropout is the same. Random numbers of other libraries are not held.
        """
        if self._window is not None and not self.ACCUMULATES_LOSSES:
            raise RuntimeError(
                f"{self.name} tries the update itself on its batch, so a window has one micro-batch. Call step() after "
                "each probe (gradient_accumulation_steps=1), or take 'mezo'."
            )
        losses = self._losses(closure, self._at(self.points()))
        before = self._window or [0.0] * len(losses)
        self._window = [a + b for a, b in zip(before, losses, strict=True)]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _losses(self, closure: Closure, makes: list[Callable[[nn.Parameter], Tensor]]) -> list[float]:
        """The loss where each parameter p is make(p), for each of `makes`."""

        def once() -> float:
            loss = closure()
            if isinstance(loss, Tensor) and loss.dtype in (torch.bfloat16, torch.float16):
                raise RuntimeError(
                    f"the loss is {str(loss.dtype).removeprefix('torch.')}, which rounds away the difference of two "
                    "losses at weights nearby. Compute it in fp32, such as from logits.float()."
                )
            return float(loss)

        return self._passes().run_each(once, makes)

    def _passes(self) -> Substitution:
        if self.model is None:
            raise RuntimeError(
                f"{self.name} has no model whose forward passes it could perturb: it was made by its class, copied or "
                f"unpickled. Make it with hf_lowmem.make_optimizer({self.name!r}, model), or call optimizer.of(model)."
            )
        store = host_layers_of(self.model)
        if self._substitution is None or self._substitution.store is not store:
            params = [p for _, p, _ in self._trained()]
            self._check_offload(store)
            if store is not None:
                self._substitution = Together(self.model, params, store)
            else:
                kind = Gathered if any(map(is_sharded, params)) else Substitution
                self._substitution = kind(self.model, params)
        return self._substitution

    def _check_offload(self, store: HostLayers | None) -> None:
        """Raise where layers are in host memory, and what belongs to their weights would not be."""
        kept = "states" if self.STATES else "weights='bf16_ecc'"
        if store is not None and (self.STATES or any(group["weights"] == "bf16_ecc" for group in self.param_groups)):
            raise ValueError(
                f"the model's layers are in host memory, and {kept} of {self.name!r} would stay on the device, for all "
                "of them at once. Take a method without states, such as 'mezo', and weights='bf16_sr'; or bring the "
                "layers back."
            )

    def _trained(self) -> Iterator[tuple[Group, nn.Parameter, Slot]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.numel():
                    slot = self._slot(p, group)
                    slot.open(self.state[p])
                    yield group, p, slot

    def _slot(self, p: Tensor, group: Group, options: tuple[object, ...] | None = None) -> Slot:
        slot = super()._slot(p, group, options)
        slot.draws = True  # the directions
        if (block := self._block(p)) is not None:
            slot.syncs = slots.reads_are_free(block.store.device)
        return slot

    def _store(self) -> HostLayers | None:
        """The layers of the model that are in host memory."""
        store = None if self._substitution is None else self._substitution.store
        return store if isinstance(store, HostLayers) else None

    def _block(self, p: Tensor) -> Block | None:
        store = self._store()
        return None if store is None else store.of(p)

    def _values(self, p: nn.Parameter) -> Tensor:
        """The weights of a parameter where a pass wants them: on the device."""
        block, near = self._block(p), {} if self._substitution is None else self._substitution.near
        return near.get(id(p), p.detach()) if block is None else block.near[id(p)]

    def _moving(self) -> list[tuple[Group, nn.Parameter, Slot]]:
        """Entries of what the next update moves: all that is trained, or one block of it after the other."""
        entries = list(self._trained())
        layers = self._agreed_option("block_layers")
        if not entries or layers is None:
            return entries
        if not self._homes or any(id(p) not in self._homes for _, p, _ in entries):
            self._homes = self._passes().blocks(layers)
        homes = [self._homes[id(p)] for _, p, _ in entries]
        order = sorted(set(homes))
        turn = order[max(slot.step for _, _, slot in entries) % len(order)]
        return [entry for entry, home in zip(entries, homes, strict=True) if home == turn]

    def _along(self, slot: Slot, group: Group) -> Along:
        share = group.get("share")
        return Along(self.DIRECTION, share, 0 if share is None else stream_key(slot.key, "share"))

    def _agreed_option(self, name: str) -> int | None:
        """An option that all groups must have alike."""
        found = {group.get(name) for group in self.param_groups}
        if len(found) > 1:
            raise ValueError(f"{name}={found}: groups differ. A pass perturbs all of them; give one number.")
        return found.pop()

    def _seeds(self, slot: Slot) -> list[int]:
        """Seeds of a parameter's directions in the update that comes next."""
        return [stream_key(slot.key, "probe", slot.step, probe) for probe in range(self.probes)]

    def _at(self, points: list[Point]) -> list[Callable[[nn.Parameter], Tensor]]:
        """Values of the parameters at each point, as functions."""
        found = {
            id(p): (group["perturbation"], self._seeds(slot), self._along(slot, group))
            for group, p, slot in self._moving()
        }

        def make(point: Point, p: nn.Parameter) -> Tensor:
            if point.probe is None or id(p) not in found:
                return self._values(p)
            perturbation, seeds, along = found[id(p)]
            return shifted(self._values(p), [(point.factor * perturbation, seeds[point.probe])], along)

        return [partial(make, point) for point in points]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Update all parameters from the losses that were probed since the last step.

        Args:
            closure: of a window of one micro-batch, in place of a call of `probe`.
        """
        loss = None if closure is None else self.probe(closure)
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            if self._is_rehearsal():
                self._update_from([0.0] * self.probes)
                return None
            raise RuntimeError(
                f"a backward pass has left gradients, and {self.name} has no use for them: it estimates from losses of "
                "forward passes. Call optimizer.step(lambda: model(**batch).loss) without loss.backward(), or use a "
                "LowMem trainer with this optim; for gradients take a method of first order, such as 'adamw'."
            )
        if self._window is None:
            raise RuntimeError(
                f"{self.name} knows no loss: step() came without a closure, and without a call of probe() before it. "
                "Call optimizer.step(lambda: model(**batch).loss)."
            )
        losses = self._agreed(self._window)
        self._window = None
        self._update_from(self.differences(losses))
        self._skips.end_step()
        return loss

    def _is_rehearsal(self) -> bool:
        """Whether this step is torch's, which makes states before a distributed checkpoint fills them: by zeros."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        rates = [with_rate(group)["lr"] for group in self.param_groups]
        return self._window is None and not self.state and not any(rates) and not any(local(g).any() for g in grads)

    def _agreed(self, losses: list[float]) -> list[float]:
        """The mean of some losses over all processes."""
        return mean_over_processes(losses, self.param_groups[0]["params"][0].device)

    def _update_from(self, differences: list[float]) -> None:
        """One step of all parameters."""
        if (store := self._store()) is not None:
            store.catch_up()  # before a step is counted, from which updates take their random numbers
        entries = self._moving()
        moving = {id(p) for _, p, _ in entries}
        for _, p, slot in self._trained():
            if id(p) not in moving:  # its turn comes by the number of the step
                slot.count_step()
                allocate(local(p), slot)
        smallest = min((group["perturbation"] for group in self.param_groups), default=1.0)
        self.slopes = tuple(d / smallest for d in differences)
        good = all(math.isfinite(slope) and abs(slope) < LARGEST_SLOPE for slope in self.slopes)
        for group, p, slot in entries:
            seeds = self._seeds(slot)
            slot.count_step()
            block = self._block(p)
            if not good:
                device = p.device if block is None else block.store.device
                self._skips.add(torch.zeros((), dtype=torch.bool, device=device), syncs=slot.syncs)
                continue
            slopes = [d / group["perturbation"] for d in differences]
            step = partial(
                self._step_one, slot=slot, group={**with_rate(group)}, terms=list(zip(slopes, seeds, strict=True))
            )
            if block is None:
                step(p)
            else:
                block.updates.append((p, step))

    def _step_one(self, p: Tensor, slot: Slot, group: Group, terms: list[tuple[float, int]]) -> None:
        """One step of a parameter, whose gradient is taken to be the sum of `terms`."""
        good = torch.ones((), dtype=torch.bool, device=p.device)
        here, first, along = local(p), slot.first(), self._along(slot, group)
        if not can_cut(here, slot) or (slot.sharded and (slot.states or slot.store.corrected)):
            grad = along.sum(terms, first, first + here.numel(), p.device).view(here.shape)
            self._skips.add(keep_or_take(self, p, grad, good, slot, group), syncs=slot.syncs)
            return
        allocate(p, slot)
        taken = good
        for start, stop in spans(here.numel(), UNIT, p.device):
            weights, part = values_of_part(here, slot, start, stop)
            grad = along.sum(terms, first + start, first + stop, p.device)
            taken = taken & keep_or_take(self, weights, grad, good, part, group)
        self._skips.add(taken, syncs=slot.syncs)

    def settle(self) -> None:
        """Make the updates that wait for their layers, which are in host memory.

        Whoever reads weights by way of the model need not call it; whoever holds a parameter itself does.
        """
        if (store := self._store()) is not None:
            store.settle()

    def state_dict(self) -> dict[str, object]:
        """The state as in torch, after all updates."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load a state as in torch; updates that wait are made before that."""
        self.settle()
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was probed, and gradients as in torch."""
        self._window = None
        super().zero_grad(set_to_none)


def shifted(p: Tensor, terms: list[tuple[float, int]], along: Along) -> Tensor:
    """p + sum(factor * direction(seed) for factor, seed in terms), rounded once, as a tensor of its own.

    Its arithmetic is fp32 (fp64 for such a parameter), a span at a time.
    """
    p = p.detach()
    out = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    here, flat = p.reshape(-1), out.view(-1)
    for start, stop in spans(p.numel(), 1, p.device):
        moved = along.sum(terms, start, stop, p.device).to(wide)
        flat[start:stop] = moved.add_(here[start:stop])
    return out

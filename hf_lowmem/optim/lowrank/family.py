"""The template of the low-rank family: project, Adam on the projection, a rule that lifts its direction.

A method is its rule, `lift`; natural_galore also preconditions the projection. All else is here once: which parameters
are projected, what becomes of the moments at a refresh, the order of eps and decay, bytes, gradient accumulation.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.adamw import ADAMW_STEP
from hf_lowmem.kernels.adamw.reference import adam_direction, descend_
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.lowrank.pipeline import rotate_first, rotate_second
from hf_lowmem.optim.lowrank.projector import PROJECTORS, Projector, basis_shape, low_shape
from hf_lowmem.optim.state import WINDOW, ParamState, StateDecl, number
from hf_lowmem.specs import OptimSpec


class LowRankOptimizer(LowMemOptimizer):
    """Base of the low-rank methods.

    ```python
    P = new_basis(grad) if t % update_gap == 0 else P        # t from 0
    R = down(grad, P)
    m = beta1 * m + (1 - beta1) * R
    v = beta2 * v + (1 - beta2) * R**2
    N = m / (sqrt(v) + eps)
    p -= lr * sqrt(1 - beta2**(t+1)) / (1 - beta1**(t+1)) * lift(grad, R, N)
    p -= lr * weight_decay * p
    ```

    Matrices and batches of matrices (fused experts) whose smaller side exceeds `rank` are projected. Everything else
    takes Adam with the same codec, R = grad and lift = N.

    Raises:
        ValueError: for `rotate` with a projection that stores no basis.
    """

    STATES = {
        "exp_avg": StateDecl(signed=True),
        "exp_avg_sq": StateDecl(signed=False),
        "basis": StateDecl(signed=True, replicated=True, average=False),
    }
    PROJECTIONS = tuple(PROJECTORS)
    # Whether `lift` goes back through the basis (else it only reads norms), and whether it limits the growth of norms.
    LIFTS: ClassVar[bool] = True
    LIMITS: ClassVar[bool] = False
    FUSED = ADAMW_STEP

    @classmethod
    def resolve(cls, spec: OptimSpec) -> dict[str, Any]:
        group = super().resolve(spec)
        if group.get("rotate") and group["projection"] == "random":
            raise ValueError(
                f"{spec.label('rotate')}=True has no effect with {spec.label('projection')}='random': two random bases "
                "have nothing in common, so there is nothing to rotate. Leave it unset, or choose 'subspace'."
            )
        return group

    def lift(
        self,
        grad: Tensor,
        low: Tensor,
        direction: Tensor,
        projector: Projector,
        state: ParamState,
        group: dict[str, Any],
    ) -> Tensor:
        """The update of a projected parameter, (..., m, n), from its gradient, R and N.

        Of a matrix that is cut into shards: of the rows that are here.
        """
        raise NotImplementedError

    def precondition(self, low: Tensor, state: ParamState, group: dict[str, Any]) -> Tensor:
        """What Adam sees of a projected gradient."""
        return low

    def rotate(self, rotation: Tensor, low: Tensor, right: bool, state: ParamState, group: dict[str, Any]) -> None:
        """Turn the states that live in the basis into the new one. `low` has the shape of a moment."""
        first, second = state.load("exp_avg", low), state.load("exp_avg_sq", low)
        state.store("exp_avg", rotate_first(first, rotation, right))
        state.store("exp_avg_sq", rotate_second(second, rotation, right))

    def update(self, p: Tensor, grad: Tensor, state: ParamState, group: dict[str, Any]) -> None:
        low, direction, projector = self.adam(grad, state, group)
        update = direction if projector is None else self.lift(grad, low, direction, projector, state, group)
        descend_(p, update, group["lr"], group["betas"], group["weight_decay"], state.step)

    def adam(self, grad: Tensor, state: ParamState, group: dict[str, Any]) -> tuple[Tensor, Tensor, Projector | None]:
        """R, Adam's direction N for it, and what has projected it: nothing where R is the gradient."""
        low, projector = grad, None
        if is_low_rank(state.shards.shape(grad), group["rank"]):
            window = state.raw.pop(WINDOW, None)
            projector, low = self._project(grad, state, group, state.step - 1, refresh=window is None)
            if window is not None:
                low = low.add_(local(window))
            low = self.precondition(low, state, group)
        exp_avg, exp_avg_sq = state.load("exp_avg", low), state.load("exp_avg_sq", low)
        direction = adam_direction(low, exp_avg, exp_avg_sq, group["betas"], group["eps"])
        state.store("exp_avg", exp_avg)
        state.store("exp_avg_sq", exp_avg_sq)
        return low, direction, projector

    def fold(self, grad: Tensor, state: ParamState, group: dict[str, Any]) -> bool:
        """Add up the projections of a window of gradients; the first one makes the basis if one is due."""
        if not (self.ACCUMULATES and is_low_rank(state.shards.shape(grad), group["rank"])):
            return False
        window = state.raw.get(WINDOW)
        _, low = self._project(grad, state, group, number(state.raw.get("step", 0)), refresh=window is None)
        state.tensor(WINDOW, lambda: torch.zeros_like(low)).add_(low)
        return True

    def _project(
        self, grad: Tensor, state: ParamState, group: dict[str, Any], step: int, *, refresh: bool
    ) -> tuple[Projector, Tensor]:
        projector = PROJECTORS[group["projection"]](grad, state, group, step, lifts=self.LIFTS)
        rotation = projector.refresh_(grad) if refresh else None
        low = projector.down(grad)
        if rotation is not None and group.get("rotate"):
            self.rotate(rotation, low, projector.tall, state, group)
        return projector, low

    def fuses(self, p: Tensor, group: dict[str, Any]) -> bool:
        return not is_low_rank(p.shape, group["rank"]) and super().fuses(p, group)

    def elementwise(self, p: Tensor, group: dict[str, Any]) -> bool:
        return not is_low_rank(p.shape, group["rank"])

    def fused_settings(self, group: dict[str, Any], steps: list[int]) -> tuple[Any, ...]:
        return steps, "family", group["lr"], *group["betas"], group["eps"], group["weight_decay"]

    def state_shapes(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
        if not is_low_rank(shape, group["rank"]):
            return {"exp_avg": shape, "exp_avg_sq": shape}
        low = low_shape(shape, group["rank"])
        shapes = {"exp_avg": low, "exp_avg_sq": low}
        if group["projection"] != "random":
            shapes["basis"] = basis_shape(shape, group["rank"])
        return shapes

    def plain_states(self, shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
        return {"prev_norm": shape[:-2]} if self.LIMITS and is_low_rank(shape, group["rank"]) else {}

    def draws(self, p: Tensor, group: dict[str, Any]) -> bool:
        projects = is_low_rank(p.shape, group["rank"]) and group["projection"] != "svd"
        return projects or super().draws(p, group)

    def state_bytes(self, p: Tensor, group: dict[str, Any]) -> int:
        limited = self.LIMITS and is_low_rank(p.shape, group["rank"])
        return super().state_bytes(p, group) + (4 * local(p).shape[:-2].numel() if limited else 0)

    @classmethod
    def unsharded_only(cls, shape: torch.Size, group: dict[str, Any]) -> str | None:
        if len(shape) == 2 and is_low_rank(shape, group["rank"]) and group["projection"] == "svd":
            return (
                f"projection='svd' with {cls.name!r} under FSDP2: an SVD needs the whole gradient of a weight, which "
                "no process has. Set projection='subspace', which adds up products of the shards, or use DDP."
            )
        return None

    def to_rows(self, name: str, value: Tensor, shape: torch.Size, group: dict[str, Any]) -> Tensor:
        turned = len(shape) == 2 and shape[0] < shape[1] and is_low_rank(shape, group["rank"]) and name != "basis"
        return value.mT if turned else value  # (r, n) -> (n, r)

    def from_rows(self, name: str, value: Tensor, shape: torch.Size, group: dict[str, Any]) -> Tensor:
        return LowRankOptimizer.to_rows(self, name, value, shape, group)


def is_low_rank(shape: torch.Size, rank: int | None) -> bool:
    """Whether a parameter of this shape takes the low-rank rule: a matrix, or a batch, that the rank makes smaller."""
    return rank is not None and len(shape) in (2, 3) and rank < min(shape[-2:])


def previous_norm(grad: Tensor, state: ParamState) -> Tensor:
    """The limiter's memory, one fp32 a matrix: (...) for a gradient (..., m, n)."""
    return state.tensor("prev_norm", lambda: torch.zeros(grad.shape[:-2], dtype=torch.float32, device=grad.device))

"""The template of the low-rank family: project, Adam on the projection, a rule that makes an update of its direction.

A method is its rule, `full_update`; natural_galore also preconditions the projection. All else is here once: which
parameters are projected, what becomes of the moments at a refresh, the order of eps and decay, accumulation.
"""

from typing import ClassVar

from torch import Tensor

from hf_lowmem.distributed import local
from hf_lowmem.kernels.adamw import ADAMW_STEP
from hf_lowmem.kernels.adamw.reference import adam_direction, descend_
from hf_lowmem.kernels.apollo.reference import channel_dim
from hf_lowmem.optim.base import LowMemOptimizer
from hf_lowmem.optim.cautious import cautious_
from hf_lowmem.optim.embeddings import other_reach, other_rule, other_states, update_other
from hf_lowmem.optim.fused import FusedStep
from hf_lowmem.optim.lowrank.pipeline import rotate_first, rotate_second
from hf_lowmem.optim.lowrank.projector import PROJECTORS, Projector, basis_shape, projected_shape
from hf_lowmem.optim.slot import Slot, is_low_rank
from hf_lowmem.optim.state import WINDOW, Group, Reach, Shape, StateDecl
from hf_lowmem.specs import check_flag


def low_rank_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of a projected gradient, of a low-rank parameter alone."""
    return projected_shape(shape, group["rank"]) if is_low_rank(shape, group["rank"]) else None


OTHERS = other_states(lambda shape, group: is_low_rank(shape, group["rank"]))


def first_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of the first moment: the projection's of a low-rank parameter."""
    return low_rank_shape(shape, group) or OTHERS["exp_avg"].shape(shape, group)


def second_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of the second moment: the projection's of a low-rank parameter."""
    return low_rank_shape(shape, group) or OTHERS["exp_avg_sq"].shape(shape, group)


def stored_basis(shape: Shape, group: Group) -> Shape | None:
    """Shape of the basis, where there is one and it is not drawn again in each step."""
    stored = is_low_rank(shape, group["rank"]) and group["projection"] != "random"
    return basis_shape(shape, group["rank"]) if stored else None


def lazy_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of the one number of a matrix whose basis is refreshed by how much it moves."""
    lazy = group.get("lazy_overlap") is not None and len(shape) == 2 and stored_basis(shape, group) is not None
    return Shape([]) if lazy else None


def one_a_matrix(shape: Shape, group: Group) -> Shape | None:
    """Shape of one number for each low-rank matrix."""
    return shape[:-2] if is_low_rank(shape, group["rank"]) else None


def channels(shape: Shape, group: Group) -> int:
    """The dimension of a matrix's channels in its projection, which is cut; of any other parameter, the rows."""
    if not is_low_rank(shape, group["rank"]):
        return 0
    return -2 if channel_dim(shape) == -1 else -1


# The memory of the limit on how fast norms may grow.
PREVIOUS_NORM = StateDecl(signed=False, shape=one_a_matrix, coded=False)
# How much of a basis was in the one before.
SHARED = StateDecl(signed=False, shape=lazy_shape, coded=False)
# The sum of projected gradients.
SUM = StateDecl(signed=True, shape=low_rank_shape, coded=False, rows=channels, passing=True)


def step_settings(group: Group, steps: list[int]) -> tuple[object, ...]:
    """Last arguments of ADAMW_STEP: see FusedStep."""
    return steps, "family", group["lr"], *group["betas"], group["eps"], group["weight_decay"]


class LowRankOptimizer(LowMemOptimizer):
    """Base of the low-rank methods.

    ```python
    P = new_basis(grad) if t % update_gap == 0 else P        # t from 0
    R = project(grad, P)
    m = beta1 * m + (1 - beta1) * R
    v = beta2 * v + (1 - beta2) * R**2
    N = m / (sqrt(v) + eps)
    p -= lr * sqrt(1 - beta2**(t+1)) / (1 - beta1**(t+1)) * full_update(grad, R, N)
    p -= lr * weight_decay * p
    ```

    Matrices and batches of matrices (fused experts) whose smaller side exceeds `rank` are projected. Everything else
    takes Adam with the same codec, R = grad and the update N; embedding and head take the rule `embeddings`.

    `cautious=True` leaves out of an update, and makes up for, what goes against the gradient (arXiv 2411.16085;
    optim/cautious.py); no kernel knows it, and embeddings by "scale" or "adam_mini" do not take it.
    An update of APOLLO's linear weights is the gradient times factors, of which nothing is ever left out.
    """

    STATES = {
        "exp_avg": StateDecl(signed=True, shape=first_shape, rows=channels),
        "exp_avg_sq": StateDecl(signed=False, shape=second_shape, rows=channels),
        "row_sq": OTHERS["row_sq"],
        "basis": StateDecl(signed=True, shape=stored_basis, rows=None, average=False, option="basis"),
    }
    FACTS = ("role",)
    CHECKS = {"cautious": check_flag}
    PROJECTIONS = tuple(PROJECTORS)
    FUSED = FusedStep(ADAMW_STEP, step_settings)
    # Whether `full_update` goes back through the basis; else it only reads norms.
    PROJECTS_BACK: ClassVar[bool] = True

    def full_update(
        self,
        grad: Tensor,
        projected: Tensor,
        direction: Tensor,
        projector: Projector,
        slot: Slot,
        group: Group,
    ) -> Tensor:
        """The update of a projected parameter, (..., m, n), from its gradient, R and N.

        Of a matrix that is cut into shards: of the rows that are here.
        """
        raise NotImplementedError

    def precondition(self, projected: Tensor, slot: Slot, group: Group) -> Tensor:
        """The projected gradient as Adam is to see it."""
        return projected

    def rotate(self, rotation: Tensor, right: bool, slot: Slot) -> None:
        """Turn the states that live in the basis into the new one. `right`: moments are (..., channels, r)."""
        first, second = slot.load("exp_avg"), slot.load("exp_avg_sq")
        slot.save("exp_avg", rotate_first(first, rotation, right))
        slot.save("exp_avg_sq", rotate_second(second, rotation, right))

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        if slot.rule not in (self.name, "adam"):
            update_other(p, grad, slot, group)
            return
        projected, direction, projector = self.adam(grad, slot, group)
        update = direction
        if projector is not None:
            update = self.full_update(grad, projected, direction, projector, slot, group)
        if group["cautious"]:
            update = cautious_(update, grad, slot, group)
        descend_(p, update, group["lr"], group["betas"], group["weight_decay"], slot.step)

    def adam(self, grad: Tensor, slot: Slot, group: Group) -> tuple[Tensor, Tensor, Projector | None]:
        """R, Adam's direction N for it, and what has projected it: nothing where R is the gradient."""
        projected, projector = grad, None
        if slot.low_rank:
            window = slot.raw.pop(WINDOW, None)
            projector, projected = self._project(grad, slot, group, slot.step - 1, refresh=window is None)
            if window is not None:
                projected = projected.add_(local(window))
            projected = self.precondition(projected, slot, group)
        exp_avg, exp_avg_sq = slot.load("exp_avg"), slot.load("exp_avg_sq")
        direction = adam_direction(projected, exp_avg, exp_avg_sq, group["betas"], group["eps"], slot.coded)
        slot.save("exp_avg", exp_avg)
        slot.save("exp_avg_sq", exp_avg_sq)
        return projected, direction, projector

    def accumulate(self, grad: Tensor, slot: Slot, group: Group) -> None:
        """Add up the projections of a window of gradients; the first one makes the basis if one is due."""
        _, projected = self._project(grad, slot, group, slot.step, refresh=WINDOW not in slot.raw)
        slot.load(WINDOW).add_(projected)

    def _project(self, grad: Tensor, slot: Slot, group: Group, step: int, *, refresh: bool) -> tuple[Projector, Tensor]:
        projector = PROJECTORS[group["projection"]](grad, slot, group, step, projects_back=self.PROJECTS_BACK)
        rotation = projector.refresh_(grad) if refresh else None
        projected = projector.project(grad)
        if rotation is not None and group.get("rotate"):
            self.rotate(rotation, projector.tall, slot)
        return projector, projected

    @classmethod
    def facts(cls, group: Group) -> tuple[str, ...]:
        return cls.FACTS if group["embeddings"] != "adam" else ()

    @classmethod
    def rule(cls, shape: Shape, group: Group) -> str:
        return cls.name if is_low_rank(shape, group["rank"]) else other_rule(group)

    @classmethod
    def reach(cls, shape: Shape, group: Group) -> Reach:
        if is_low_rank(shape, group["rank"]):
            return "whole"
        reach = other_reach(group)
        return "whole" if group["cautious"] and reach == "value" else reach

    @classmethod
    def unsharded_only(cls, shape: Shape, group: Group) -> str | None:
        if len(shape) == 2 and is_low_rank(shape, group["rank"]) and group["projection"] == "svd":
            return (
                f"projection='svd' with {cls.name!r} under FSDP2: an SVD needs the whole gradient of a weight, which "
                "no process has. Set projection='subspace', which adds up products of the shards, or use DDP."
            )
        return None

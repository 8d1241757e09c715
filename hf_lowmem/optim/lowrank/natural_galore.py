"""Natural GaLore: the projected gradient, preconditioned by the inverse of an empirical Fisher matrix.

Directions in which the last few gradients were large are damped before Adam sees them. The Fisher matrix of a projected
gradient with N values is N×N, but it is a multiple of the identity plus one outer product for each remembered gradient,
so its inverse costs a solve of that small number of equations (Woodbury).
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowmem.distributed import WHOLE, Whole
from hf_lowmem.optim.linalg import linalg
from hf_lowmem.optim.lowrank.family import channels, low_rank_shape
from hf_lowmem.optim.lowrank.galore import GaLore
from hf_lowmem.optim.lowrank.pipeline import rotate_first
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, Shape, StateDecl
from hf_lowmem.specs import check_integer, check_number

# Times the largest squared norm in the history: the rounding of its sums in fp32, below which damping means nothing.
SMALLEST_DAMPING = 1e-6
TINY = 1e-30  # instead of a damping of 0, where there has been no gradient


def natural_gradient(history: Tensor, newest: int, damping: float | None, shards: Whole = WHOLE) -> Tensor:
    """(lambda * I + H @ H.T)**-1 @ g for g = H[:, newest], without a matrix larger than s×s.

    ```python
    g / lambda - H @ inv(I + H.T @ H / lambda) @ H.T @ g / lambda**2        # Woodbury, the paper's form
    H @ inv(lambda * I + H.T @ H) @ unit(newest)                            # the same, used here
    ```

    Since g is a column of H, the second form follows from inv(a*I + H @ H.T) @ H = H @ inv(a*I + H.T @ H). The first is
    a difference of two numbers that are almost equal once the gradients outweigh lambda.

    Args:
        history: (..., s, a, b), the last s projected gradients, each flattened to a column of H.
        newest: which of them is g.
        damping: lambda, in units of a squared gradient norm, raised to 1e-6 of the largest one in the history. `None`:
            lambda = norm(H)**2 / s, and the result times lambda, so that it has the gradient's scale.
        shards: where the other channels of H are: the products of its columns are sums over all of them.

    Returns:
        (..., a, b).
    """
    columns = history.flatten(-2)  # (..., s, a * b): H.T
    gram = shards.sum_((columns @ columns.mT).double())  # s×s: a solve in float64 costs nothing
    squares = torch.diagonal(gram, dim1=-2, dim2=-1)
    if damping is None:
        strength = squares.mean(-1, keepdim=True).clamp_(min=TINY)
    else:
        strength = squares.amax(-1, keepdim=True).mul(SMALLEST_DAMPING).clamp_(min=damping)
    unit = torch.zeros_like(squares)
    unit[..., newest] = 1 if damping is not None else strength[..., 0]
    gram = gram + torch.diag_embed(strength.expand_as(squares))
    weights = linalg.solve_ex(gram, unit)[0].to(columns.dtype)  # `solve` would sync
    return (weights[..., None, :] @ columns).view(history[..., 0, :, :].shape)


def check_damping(label: str, value: Any) -> None:
    """Raise unless `value` is None or a number above 0."""
    if value is not None:
        check_number(label, value, low=0.0, low_open=True)


def history_shape(shape: Shape, group: Group) -> Shape | None:
    """Shape of the remembered gradients, (..., s, a, b) for projections (..., a, b)."""
    one = low_rank_shape(shape, group)
    return None if one is None else Shape([*one[:-2], group["history"], *one[-2:]])


HISTORY = StateDecl(signed=True, shape=history_shape, rows=channels, average=False)


class NaturalGaLore(GaLore):
    """Natural GaLore (arXiv 2410.16029, section 3).

    ```python
    # grad (m, n), m >= n; P (n, r) and R = grad @ P as in GaLore
    H = stack(R_t, R_t-1, ..., R_t-s+1)                      # each flattened: (m * r, s)
    R = inv(lambda * I + H @ H.T) @ R                        # by Woodbury: an s×s solve
    m, v, N and the step as in GaLore, with this R
    ```

    Applies to the same parameters as `galore`.

    State: GaLore's and s * r * max(m, n) values for the history, all in the codec. The authors' code keeps 20 gradients
    in fp32, ten times the size of Adam's moments.

    Options: GaLore's, and
    - `history` (s, 4): how many projected gradients, the newest included, make the Fisher matrix;
    - `damping` (lambda, None): a number is the paper's lambda, in units of the squared norm of a projected gradient.
      Far above that norm the method is GaLore; far below, what a gradient has in common with the last ones is removed,
      and the rest, mostly noise, decides the step. As norms differ by layer and over time, `None` takes their mean
      square and multiplies by it: a direction that all s gradients share is damped 1 + s times against a new one.
    At a refresh the remembered gradients keep their old coordinates, unless `rotate=True` turns them with the moments.

    Recommended: as GaLore for learning rate, rank and scale, in pre-training and in fine-tuning; leave `damping` unset
    unless you know the norms. Not for you when bytes are short: with s = 4 it takes up to three times GaLore's.
    """

    name = "natural_galore"
    STATES = {**GaLore.STATES, "history": HISTORY}
    DEFAULTS: ClassVar[dict[str, Any]] = {**GaLore.DEFAULTS, "damping": None, "history": 4}
    CHECKS = {
        **GaLore.CHECKS,
        "damping": check_damping,
        "history": functools.partial(check_integer, low=1),
    }
    STRUCTURAL = (*GaLore.STRUCTURAL, "history")

    def precondition(self, projected: Tensor, slot: Slot, group: Group) -> Tensor:
        newest = (slot.step - 1) % group["history"]
        history = load_history(slot)
        history[..., newest, :, :] = projected
        natural = natural_gradient(history, newest, group["damping"], slot.shards)
        save_history(history, slot)
        return natural

    def rotate(self, rotation: Tensor, right: bool, slot: Slot) -> None:
        super().rotate(rotation, right, slot)
        save_history(rotate_first(load_history(slot), rotation[..., None, :, :], right), slot)


def load_history(slot: Slot) -> Tensor:
    """The ring of s projected gradients (a, b), (..., s, a, b). Update t from 0 fills slot t % s of it.

    Shards are cut by channels, so a channel's part of all s gradients is one row of what is stored.
    """
    history = slot.load("history")
    return history.movedim(1, 0) if slot.cut else history


def save_history(history: Tensor, slot: Slot) -> None:
    """Encode what `load_history` gave."""
    slot.save("history", history.movedim(0, 1) if slot.cut else history)

"""Rules of zeroth order with two-sided probes: what is done with an estimate `u` of the gradient."""

from typing import ClassVar

from torch import Tensor

from hf_lowmem.optim.adamw import adamw_update
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Group, StateDecl
from hf_lowmem.optim.zeroth.estimate import ZerothOrder
from hf_lowmem.optim.zeroth.settings import COMMON, PROBING
from hf_lowmem.specs import check_number

__all__ = ["Mezo", "ZoAdam", "ZoAdamM", "ZoMomentum", "ZoSign"]


def check_momentum(label: str, value: object) -> None:
    """Raise unless a decay rate is in [0, 1)."""
    check_number(label, value, low=0.0, high=1.0)


class Mezo(ZerothOrder):
    """MeZO (arXiv 2305.17333): stochastic gradient descent on the estimate.

    ```python
    u  = mean((loss(p + eps * z) - loss(p - eps * z)) / (2 * eps) * z for z in directions)
    p -= lr * (u + weight_decay * p)
    ```

    Defaults: perturbation (eps) 1e-3, probes 1. State: none. Memory: the weights, one layer of them more, embedding and
    head once more, and a forward pass.

    Recommended (the authors' grids): a constant learning rate; 1e-7 for all weights of a model above a billion, 1e-6
    below; LoRA 5e-5 with perturbation 1e-2; bf16 weights with `weights="bf16_sr"`, or most of an update is rounded
    away. Not for you where a backward pass fits: it takes 10 to 100 times as many steps, each two forward passes, works
    for fine-tuning to what a prompt could nearly do, and not for pre-training.
    """

    name = "mezo"
    STATES: ClassVar[dict[str, StateDecl]] = {}
    DEFAULTS: ClassVar[Group] = COMMON
    CHECKS = PROBING

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(grad.to(p.dtype).mul_(group["lr"]))


class ZoSign(ZerothOrder):
    """ZO-SignSGD: each weight moves by the learning rate, along the sign of its estimate.

    ```python
    p *= 1 - lr * weight_decay
    p -= lr * sign(u)                                    # u as in mezo
    ```

    Value by value, as the method's paper has it; ZO-Bench's code (arXiv 2402.11592) takes the sign of the slope alone,
    which is another method. Defaults and state as `mezo`'s. Recommended: learning rates of 1e-8 to 1e-6. Not for you
    with one probe on a noisy loss: the sign of an estimate is right little more often than not, and how large the slope
    is, is thrown away; take `mezo` first.
    """

    name = "zo_sign"
    STATES: ClassVar[dict[str, StateDecl]] = {}
    DEFAULTS: ClassVar[Group] = COMMON
    CHECKS = PROBING

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(grad.sign().to(p.dtype).mul_(group["lr"]))


class ZoMomentum(ZerothOrder):
    """MeZO with a momentum, which a codec stores.

    ```python
    m  = momentum * m + u                                # u as in mezo; stored signed
    p -= lr * (m + weight_decay * p)
    ```

    Defaults: perturbation 1e-3, probes 1, momentum 0.9. State, bytes a parameter: fp32 4, bf16 2, int8 1.02; parameters
    of fewer than 4,096 values keep fp32. Recommended: a tenth of `mezo`'s learning rate, for the sum has ten terms;
    `state="int8"`. Not for you where the state does not fit: it averages estimates as more probes do, without their
    passes, and ZO-Bench found it no better than `mezo` at its own rate.
    """

    name = "zo_momentum"
    STATES = {"momentum_buffer": StateDecl(signed=True)}
    DEFAULTS: ClassVar[Group] = COMMON | {"momentum": 0.9}
    CHECKS = {**PROBING, "momentum": check_momentum}

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        buffer = slot.load("momentum_buffer")
        buffer.mul_(group["momentum"]).add_(grad)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer.to(p.dtype) * group["lr"])
        slot.save("momentum_buffer", buffer)


class ZoAdam(ZerothOrder):
    """AdamW on the estimate (ZO-Adam of arXiv 2402.11592), whose moments codecs store.

    State, bytes a parameter, as `adamw`: fp32 8, 8bit 2.07, int8 2.03, int4 1.09. Defaults: perturbation 1e-3, probes
    1, betas (0.9, 0.999), eps 1e-8. Recommended: learning rates of 1e-6 to 1e-5, `state="8bit"`. Not for you where
    nothing but the weights fits, or where you expect of it what Adam does for gradients: the second moment of slope * z
    is nearly the same for all weights, so what it adapts to is the size of the slope.
    """

    name = "zo_adam"
    STATES = {"exp_avg": StateDecl(signed=True), "exp_avg_sq": StateDecl(signed=False)}
    DEFAULTS: ClassVar[Group] = COMMON | {"betas": (0.9, 0.999), "eps": 1e-8}
    CHECKS = PROBING

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        adamw_update(p, grad, slot, group)


class ZoAdamM(ZerothOrder):
    """ZO-AdaMM (arXiv 1910.06513): Adam's two moments on the estimate, and a second one that never falls.

    ```python
    m    = beta1 * m + (1 - beta1) * u                   # u as in mezo
    v    = beta2 * v + (1 - beta2) * u**2
    vmax = max(vmax, v)
    p   -= lr * m / (sqrt(vmax) + eps)
    ```

    Without bias correction, and with eps for a root of zero. Defaults as `zo_adam`'s. State, bytes a parameter: fp32
    12, 8bit 3.11. Recommended: as `zo_adam`. Not for you where one batch may have an outlying slope: its step stays
    small ever after. It takes the most memory of all of zeroth order.
    """

    name = "zo_adamm"
    STATES = {
        "exp_avg": StateDecl(signed=True),
        "exp_avg_sq": StateDecl(signed=False),
        "max_exp_avg_sq": StateDecl(signed=False, average=False),
    }
    DEFAULTS: ClassVar[Group] = COMMON | {"betas": (0.9, 0.999), "eps": 1e-8}
    CHECKS = PROBING

    def update(self, p: Tensor, grad: Tensor, slot: Slot, group: Group) -> None:
        m, v, largest = (slot.load(name) for name in self.STATES)
        beta1, beta2 = group["betas"]
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        largest.copy_(largest.maximum(v))
        step = m / largest.sqrt().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.to(p.dtype).mul_(group["lr"]))
        for name, value in zip(self.STATES, (m, v, largest), strict=True):
            slot.save(name, value)

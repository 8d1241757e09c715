"""Optimizers whose state is compressed, low-rank, or both: one table, any method with any codec.

Adding one: a file with its fp32 function and a thin class, and a line in `OPTIMIZERS`. The contract suite, the command
line and the benchmarks take it from there. Methods that take no gradients have a part of the table to themselves,
`ZEROTH`; the whole of it is `ALL_METHODS`.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from hf_lowmem.optim.adam_mini import AdamMini
from hf_lowmem.optim.adamw import AdamW
from hf_lowmem.optim.backward import StepInBackward
from hf_lowmem.optim.base import LowMemOptimizer, check_store
from hf_lowmem.optim.cautious import warn_left_out
from hf_lowmem.optim.groups import parameter_groups
from hf_lowmem.optim.lamb import Lamb
from hf_lowmem.optim.lion import Lion
from hf_lowmem.optim.lowrank.apollo import Apollo, ApolloMini
from hf_lowmem.optim.lowrank.fira import Fira
from hf_lowmem.optim.lowrank.galore import GaLore
from hf_lowmem.optim.lowrank.natural_galore import NaturalGaLore
from hf_lowmem.optim.method import METHODS, elementwise, methods_with
from hf_lowmem.optim.muon import Muon
from hf_lowmem.optim.placement import small_apart
from hf_lowmem.optim.resting import check_awake, check_rests, rest
from hf_lowmem.optim.scale import Scale
from hf_lowmem.optim.slot import SMALLEST_COMPRESSED
from hf_lowmem.optim.soap import Soap
from hf_lowmem.optim.state import Group
from hf_lowmem.optim.zeroth import ZEROTH, ZerothOrder
from hf_lowmem.specs import STORES_AT_REST, OptimSpec, check_choice

OPTIMIZERS: dict[str, type[LowMemOptimizer]] = {
    cls.name: cls
    for cls in (AdamW, AdamMini, Lion, Lamb, Soap, Muon, Scale, GaLore, Fira, Apollo, ApolloMini, NaturalGaLore)
}
ALL_METHODS: dict[str, type[LowMemOptimizer]] = {**OPTIMIZERS, **ZEROTH}
METHODS.update(ALL_METHODS)


def from_spec(
    spec: OptimSpec,
    model: nn.Module,
    *,
    decay: Collection[str] | None = None,
    flat: bool = False,
    later: bool = False,
) -> LowMemOptimizer:
    """The optimizer that `spec` describes, over the trainable parameters of `model`; see `parameter_groups`.

    With weights="int8_sr" the model's weights are put to rest; see hf_lowmem/optim/resting.py.

    Args:
        flat: for an engine that makes one vector of each group (DeepSpeed's ZeRO); see `small_apart`.
        later: the weights go to rest when FSDP2 has cut them, by `rest(spec, model, optimizer=...)`.
    """
    cls = check_spec(spec)
    options = cls.resolve(spec)
    rests = spec.weights in STORES_AT_REST
    if rests:
        check_rests(spec, model)
    else:
        check_awake(spec, model)
        trained, adapters = (
            [p for p in model.parameters() if p.requires_grad],
            bool(getattr(model, "peft_config", None)),
        )
        check_store(spec.label("weights"), spec.weights, trained, adapters=adapters)
    groups = parameter_groups(model, spec, rank=options.get("rank"), facts=cls.facts(options), decay=decay)
    if spec.embeddings not in (None, cls.DEFAULTS.get("embeddings")) and not any(
        group["role"] in ("embedding", "head") for group in groups
    ):
        raise ValueError(
            f"{spec.label('embeddings')}={spec.embeddings!r} has no effect: neither an embedding nor an output head of "
            f"{type(model).__name__} is trained. Leave it unset, or train one of them."
        )
    if options.get("cautious") and (rule := options.get("embeddings", "adam")) != "adam":
        warn_left_out(rule)
    if flat and options["state"] != "fp32":
        groups = small_apart(groups, SMALLEST_COMPRESSED)
    if rests and later:
        options |= {"weights": "bf16_sr"}  # as those that never go to rest are stored
    elif rests:
        rest(spec, model)
    made = cls(groups, **{k: v for k, v in options.items() if k != "method"})
    return made.of(model) if isinstance(made, ZerothOrder) else made


def check_spec(spec: OptimSpec) -> type[LowMemOptimizer]:
    """The class that `spec` names, after all that can be checked without a model.

    Raises:
        ValueError: for an unknown method or codec, or an option without effect.
    """
    check_choice(spec.label("name"), spec.name, ALL_METHODS)
    cls = ALL_METHODS[spec.name]
    cls.resolve(spec)
    if spec.target_modules is not None and "rank" not in cls.DEFAULTS:
        raise ValueError(
            f"{spec.label('target_modules')}={spec.target_modules!r} has no effect with "
            f"{spec.label('name')}={spec.name!r}, which treats every parameter alike. Leave it unset, or choose: "
            f"{', '.join(methods_with('rank'))}."
        )
    for fact in spec.options.keys() & {*cls.FACTS, *({"experts"} & cls.DEFAULTS.keys())}:
        own = {"experts": "num_experts", "splits": "split_sizes", "head": "head_dim"}.get(fact)
        remedy = f"; a module of your own says it by an attribute `{own}`" if own else ""
        raise ValueError(
            f"{spec.label('options')}: {fact}={spec.options[fact]!r} has no effect: the model says that of each "
            f"weight. Leave it unset{remedy}."
        )
    return cls


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float = 1e-3,
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
    target_modules: str | list[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> LowMemOptimizer:
    """An optimizer of ours for a model: an ordinary torch optimizer, for Trainer's `optimizers=` or a loop of your own.

    ```python
    optimizer = make_optimizer("apollo_mini", model, lr=1e-4, state="8bit")
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[LowMemCallback()])
    ```

    Args:
        name: one of `OPTIMIZERS`, or of `ZEROTH` for a loop without backward passes.
        model: its trainable parameters are taken. Parameters with one dimension (biases, norms) do not decay.
        lr: learning rate.
        betas: decay rates of the first and the second moment; `None` for the method's own.
        eps: `None` for the method's own.
        weight_decay: decoupled, as in AdamW.
        state: codec of the moments, one of `hf_lowmem.codecs.CODECS`; a pair "int8,fp8_expand" for the first and the
            second moment; or "8bit", the recommended pair.
        weights: how weights are written: "keep", in their own dtype by rounding to nearest; for bf16 weights also
            "bf16_sr", rounded at random, "bf16_ecc", with 8 more bits kept beside them, and "int8_sr": the model's
            linear layers and its embedding keep int8 codes, 1.03 bytes a weight, from here on and until
            `hf_lowmem.weights.wake(model)`; for `StepInBackward(optimizer)` alone.
        rank, update_gap, scale, projection, rotate: of a low-rank method; `None` for its defaults.
        embeddings: the rule of embedding and output head, where the method's own is for linear weights: "adam",
            "scale" or "adam_mini".
        target_modules: which modules take the low-rank rule; `None` for every linear one but the output head.
        seed: start of the random projections and of random rounding.
        **options: what one method alone understands, such as natural_galore's `damping`.

    Raises:
        TypeError, ValueError: naming the argument, its value, the reason and the remedy.
    """
    _check_model(name, model)
    spec = OptimSpec(
        name=name,
        lr=lr,
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
        target_modules=target_modules,
        seed=seed,
        options=options,
    )
    return from_spec(spec, model)


def _check_model(name: str, model: object) -> None:
    if isinstance(name, nn.Module):
        raise TypeError(f"name: expected an optimizer's name, got {type(name).__name__}: make_optimizer(name, model).")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}. For bare parameters use the class: "
            f"hf_lowmem.optim.OPTIMIZERS[{name!r}](params, lr=...)."
        )


def _rule_of(optimizer: LowMemOptimizer, group: Group) -> str:
    """The rule of a group's parameters, and of what, where it goes by that."""
    rules = ", ".join(sorted({optimizer.rule(p.shape, group) for p in group["params"]}))
    return f"{rules} ({group['role']})" if group.get("role") in ("embedding", "head") else rules


def group_table(optimizer: LowMemOptimizer) -> list[dict[str, Any]]:
    """One row a group, for a log: what it holds and how its state is stored."""
    return [
        {
            "rule": _rule_of(optimizer, group),
            "rank": group.get("rank"),
            "weight_decay": group["weight_decay"],
            "state": group["state"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "state_bytes": sum(optimizer.state_bytes(p, group) for p in group["params"]),
        }
        for group in optimizer.param_groups
    ]


__all__ = [
    "ALL_METHODS",
    "OPTIMIZERS",
    "ZEROTH",
    "AdamMini",
    "AdamW",
    "Apollo",
    "ApolloMini",
    "Fira",
    "GaLore",
    "Lamb",
    "Lion",
    "LowMemOptimizer",
    "Muon",
    "NaturalGaLore",
    "Scale",
    "Soap",
    "StepInBackward",
    "ZerothOrder",
    "check_spec",
    "elementwise",
    "from_spec",
    "group_table",
    "make_optimizer",
    "methods_with",
]

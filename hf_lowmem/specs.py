"""Settings as a user asks for them, checked once, before anything is loaded.

A spec is a frozen dataclass of plain values. It imports nothing of ours and no torch, so the command line, the
planner and the trainers can all build one cheaply and hand it down. Whether an option *means* something to a
method is that method's knowledge (`LowMemOptimizer.resolve`); whether a value is *possible* is decided here.

The same value reaches us under two names: `rank=` in `make_optimizer`, `lowmem_rank` in TrainingArguments. An
error must name the one that the user typed, therefore a spec carries `labels`.
"""

# A user's value may be of any type, whatever the annotation says: it is looked at.
# pyright: reportUnnecessaryIsInstance=false

import ast
import difflib
import itertools
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

__all__ = [
    "ACCUMULATIONS",
    "EMBEDDING_RULES",
    "INPUT_TIERS",
    "LABELS",
    "OFFLOADS",
    "OPTIMIZER_FIELDS",
    "PROJECTIONS",
    "STORES_AT_REST",
    "STREAMED",
    "TIERS",
    "WEIGHT_STORES",
    "ActivationSpec",
    "LossSpec",
    "OptimSpec",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_number",
    "parse_options",
]

WEIGHT_STORES = ("keep", "bf16_sr", "bf16_ecc")
STORES_AT_REST = ("int8_sr",)  # of a model, whose layers decode them; no kernel of a step knows such weights
ACCUMULATIONS = ("int8_sr",)  # how gradients are added up that step in backward frees
PROJECTIONS = ("svd", "subspace", "random")
# Rules that embedding and output head may take beside another for linear weights.
EMBEDDING_RULES = ("adam", "scale", "adam_mini")

# How OptimSpec's fields are called in training arguments.
LABELS = {
    "name": "optim",
    "lr": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "state": "lowmem_state",
    "weights": "lowmem_weights",
    "rank": "lowmem_rank",
    "update_gap": "lowmem_update_gap",
    "scale": "lowmem_scale",
    "projection": "lowmem_projection",
    "rotate": "lowmem_rotate",
    "embeddings": "lowmem_embeddings",
    "options": "optim_args",
    "target_modules": "optim_target_modules",
}
OPTIMIZER_FIELDS = ("state", "weights", "rank", "update_gap", "scale", "projection", "rotate", "embeddings")


def check_number(label: str, value: Any, *, low: float, low_open: bool = False, high: float = math.inf) -> None:
    """Raise unless `value` is a finite real number in [low, high), or (low, high) with `low_open`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{label}={value!r}: expected a number, got {type(value).__name__}.")
    number = float(value)
    if not math.isfinite(number) or number < low or (low_open and number == low) or number >= high:
        bounds = f"{'(' if low_open else '['}{low:g}, {'inf' if high == math.inf else f'{high:g}'})"
        raise ValueError(f"{label}={value!r}: must be a finite number in {bounds}.")


def check_integer(label: str, value: Any, *, low: int) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{label}={value!r}: expected an integer, got {type(value).__name__}.")
    if value < low:
        raise ValueError(f"{label}={value!r}: must be at least {low}.")


def check_flag(label: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{label}={value!r}: expected True or False, got {type(value).__name__}.")


def check_choice(label: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`; the error lists the nearest."""
    if not isinstance(value, str):
        raise TypeError(f"{label}={value!r}: expected a string, got {type(value).__name__}.")
    names = list(choices)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"{label}={value!r} is not available. {hint}Choose from: {', '.join(names)}.")


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """One optimizer, as asked for. `None` means the method's own default.

    Args:
        name: a name of `hf_lowmem.optim.OPTIMIZERS`.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1); `None` for the method's own.
        eps: added to the root of the second moment, > 0 (0 would make 0/0 of a row that has had no gradient); with
            moments in fewer bits than fp32, 1e-10 or more.
        weight_decay: decoupled decay, >= 0.
        state: what stores the moments: the name of a codec, of a pair of them, or two names "signed,unsigned".
        weights: how updated weights are written back.
        rank: number of rows or columns that a low-rank method keeps, >= 1.
        update_gap: steps between two refreshes of the projection, >= 1.
        scale: factor on the low-rank update, > 0.
        projection: how a low-rank method projects.
        rotate: whether a low-rank method rotates its moments into a new basis when it refreshes it.
        embeddings: the rule of embedding and output head, of a method whose own is for linear weights.
        target_modules: which modules take the low-rank rule; `None` or "all-linear" for every linear one, a regular
            expression, or a list of parts of module names.
        seed: start of every random stream of the optimizer.
        options: what one method alone understands, such as `damping`; the method checks it.
        labels: how an error calls each field, where it is not the field's own name.

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    name: str
    lr: float = 1e-3
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    state: str = "fp32"
    weights: str = "keep"
    rank: int | None = None
    update_gap: int | None = None
    scale: float | None = None
    projection: str | None = None
    rotate: bool | None = None
    embeddings: str | None = None
    target_modules: str | list[str] | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict[str, object])
    labels: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    def label(self, name: str) -> str:
        """The name by which the user knows the field `name`."""
        return self.labels.get(name, name)

    def __post_init__(self) -> None:
        check_number(self.label("lr"), self.lr, low=0.0)
        if self.betas is not None and (not isinstance(self.betas, tuple | list) or len(self.betas) != 2):
            raise TypeError(f"{self.label('betas')}={self.betas!r}: expected two numbers, such as (0.9, 0.999).")
        for i, beta in enumerate(self.betas or (), start=1):
            check_number(self.labels.get(f"beta{i}", f"betas[{i - 1}]"), beta, low=0.0, high=1.0)
        if self.eps is not None:
            check_number(self.label("eps"), self.eps, low=0.0, low_open=True)
        check_number(self.label("weight_decay"), self.weight_decay, low=0.0)
        if not isinstance(self.state, str):
            raise TypeError(f"{self.label('state')}={self.state!r}: expected the name of a codec, such as 'int8'.")
        check_choice(self.label("weights"), self.weights, (*WEIGHT_STORES, *STORES_AT_REST))
        if self.rank is not None:
            check_integer(self.label("rank"), self.rank, low=1)
        if self.update_gap is not None:
            check_integer(self.label("update_gap"), self.update_gap, low=1)
        if self.scale is not None:
            check_number(self.label("scale"), self.scale, low=0.0, low_open=True)
        if self.projection is not None:
            check_choice(self.label("projection"), self.projection, PROJECTIONS)
        if self.rotate is not None:
            check_flag(self.label("rotate"), self.rotate)
        if self.embeddings is not None:
            check_choice(self.label("embeddings"), self.embeddings, EMBEDDING_RULES)
        targets = self.target_modules
        if targets is not None:
            listed = [targets] if isinstance(targets, str) else targets
            if not isinstance(listed, list | tuple) or not all(isinstance(t, str) for t in listed):
                raise TypeError(
                    f"{self.label('target_modules')}={targets!r}: expected 'all-linear', a regular expression, or a "
                    "list of parts of module names, such as ['q_proj', 'v_proj']."
                )
            if not listed or not all(listed):
                raise ValueError(
                    f"{self.label('target_modules')}={targets!r} names no module. Leave it unset for every linear one."
                )
        check_integer(self.label("seed"), self.seed, low=0)


def parse_options(optim_args: str | None, name: str) -> dict[str, Any]:
    """HuggingFace's `optim_args`, "key=value,key=value", as the options that a method alone understands.

    Raises:
        TypeError: for what is no text.
        ValueError: for a pair without "=", or for what has a field of its own.
    """
    if not isinstance(optim_args, str | None):
        raise TypeError(
            f"optim_args={optim_args!r}: expected text of the form 'key=value,key=value', as HuggingFace takes it, got "
            f"{type(optim_args).__name__}. Write it so."
        )
    options: dict[str, Any] = {}
    for pair in filter(None, (optim_args or "").replace(" ", "").split(",")):
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise ValueError(f"optim_args={optim_args!r}: {pair!r} is not of the form key=value. Write it so.")
        if key in {f.name for f in fields(OptimSpec)}:
            raise ValueError(
                f"optim_args={optim_args!r}: with optim={name!r} this is a field of its own. Set "
                f"{LABELS.get(key, 'adam_beta1 and adam_beta2' if key == 'betas' else key)} instead."
            )
        try:
            options[key] = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One preference loss of ours as part of a sum of losses.

    Args:
        name: a name of `hf_lowmem.preference.losses.PREFERENCE_LOSSES`.
        weight: its weight in the sum, finite.
        options: the loss's keywords, all of them. Which it takes, and in what range, the loss alone knows.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict[str, object])

    def __post_init__(self) -> None:
        check_number("loss_weights", self.weight, low=-math.inf)


TIERS = ("exact", "fp8", "fp8_recompute", "checkpoint_fp8", "hooks_fp8")
STREAMED = ("stream", "stream_fp8")  # tiers that run a layer by chunks of tokens
# Of layers that keep their input, and are run again in backward.
INPUT_TIERS = ("checkpoint_fp8", *STREAMED)
OFFLOADS = ("inputs", "weights")  # what may be kept in host memory
_LAYERS = re.compile(r"(\d+)(-(\d*))?")


class _Part(NamedTuple):
    """A tier as it was written: its name, its first layer and its last (None: the model's), how many share an input."""

    tier: str
    first: int
    last: int | None
    every: int


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Activation tiers: what a converted model keeps for the backward pass, layer by layer.

    Args:
        tiers: one name of TIERS or STREAMED for every layer, or a list by layer number, counted from 0:
            "fp8:0-11,checkpoint_fp8:12-". A range includes both ends; "12-" goes to the last layer, "7" is one layer.
            A layer that no range names stays as HuggingFace made it. "stream/4" and "stream_fp8/4" keep every fourth
            layer's input only, and compute those between once more.
        stochastic: round stochastically where a tier compresses, with a seed that is hashed from the run's, the layer
            and the step; else to the nearest.
        chunk: tokens that a layer of a streamed tier runs on at a time; None for as many as fit in 1 GiB.
        seed: of the run, for stochastic rounding; None: that of torch's generator when a model is converted.
        offload: "inputs": layers that keep their input keep it in host memory.
        labels: how an error calls each field, where it is not the field's own name.

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    tiers: str
    stochastic: bool = False
    chunk: int | None = None
    seed: int | None = None
    offload: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    def label(self, name: str) -> str:
        """The name by which the user knows the field `name`."""
        known = {"tiers": "lowmem_activations", "chunk": "lowmem_stream_chunk", "offload": "lowmem_offload"}
        return self.labels.get(name, known.get(name, name))

    def __post_init__(self) -> None:
        if not isinstance(self.stochastic, bool):
            raise TypeError(f"{self.label('stochastic')}={self.stochastic!r}: expected True or False.")
        label = self.label("tiers")
        if not isinstance(self.tiers, str):
            check_choice(label, self.tiers, (*TIERS, *STREAMED))
        tiers = {tier for tier, _, _ in self.ranges}
        self._check_chunk(tiers)
        if self.stochastic and tiers <= {"exact", "stream"}:
            raise ValueError(
                f"{self.label('stochastic')}=True has no effect with {label}={self.tiers!r}, which rounds nothing. "
                "Leave it unset, or choose a tier that compresses, such as 'fp8'."
            )
        if self.offload is not None:
            check_choice(self.label("offload"), self.offload, ("inputs",))
            if not any(tier in INPUT_TIERS for tier, _, _ in self.ranges):
                raise ValueError(
                    f"{self.label('offload')}={self.offload!r} has no effect with {label}={self.tiers!r}: no layer "
                    f"keeps its input alone. Leave it unset, or choose a tier that does: {', '.join(INPUT_TIERS)}."
                )
        ends = sorted((first, math.inf if last is None else last) for _, first, last in self.ranges)
        for (_, end), (start, _) in itertools.pairwise(ends):
            if start <= end:
                raise ValueError(f"{label}={self.tiers!r} names layer {start} twice. Give each layer one tier.")

    def _check_chunk(self, tiers: set[str]) -> None:
        if self.chunk is None:
            return
        label = self.label("chunk")
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, numbers.Integral):
            kind = type(self.chunk).__name__
            raise TypeError(f"{label}={self.chunk!r}: expected a number of tokens, such as 2048, got {kind}.")
        if self.chunk < 1:
            raise ValueError(
                f"{label}={self.chunk!r}: a chunk has at least one token. Set some thousands, such as 2048, or leave "
                "it unset for as many as fit in 1 GiB."
            )
        if not tiers & set(STREAMED):
            raise ValueError(
                f"{label}={self.chunk!r} has no effect with {self.label('tiers')}={self.tiers!r}, which runs layers on "
                "all tokens at once. Leave it unset, or set lowmem_activations='stream_fp8'."
            )

    @property
    def ranges(self) -> list[tuple[str, int, int | None]]:
        """(tier without its "/N", first layer, last layer or None for the model's last), as they were written."""
        return [(part.tier, part.first, part.last) for part in self._parts]

    @property
    def _parts(self) -> list[_Part]:
        if ":" not in self.tiers:
            tier, every = self._split(self.tiers)
            return [_Part(tier, 0, None, every)]
        found: list[_Part] = []
        for part in self.tiers.split(","):
            tier, _, layers = part.strip().partition(":")
            match = _LAYERS.fullmatch(layers.strip())
            last = None if match is None or match[3] == "" else int(match[3] or match[1])
            if match is None or (last is not None and last < int(match[1])):
                raise ValueError(
                    f"{self.label('tiers')}={self.tiers!r}: {part.strip()!r} is not a tier with its layers. Write "
                    "'fp8:0-11,checkpoint_fp8:12-', or one tier for all layers."
                )
            tier, every = self._split(tier)
            found.append(_Part(tier, int(match[1]), last, every))
        return found

    def _split(self, text: str) -> tuple[str, int]:
        """Tier and N of "tier/N"; 1 where there is none."""
        tier, slash, number = text.partition("/")
        check_choice(self.label("tiers"), tier, (*TIERS, *STREAMED))
        if slash and (tier not in STREAMED or not number.isdecimal() or int(number) < 2):
            raise ValueError(
                f"{self.label('tiers')}={self.tiers!r}: '/N' keeps the input of every Nth layer, for tiers "
                f"{' and '.join(STREAMED)} and whole numbers from 2 on. Write 'stream_fp8/4', or leave it out."
            )
        return tier, int(number or 1)

    def of_layers(self, count: int) -> list[str | None]:
        """The tier of each of `count` layers. Raises ValueError if a range names a layer that there is not."""
        tiers: list[str | None] = [None] * count
        for tier, first, last in self.ranges:
            if first >= count or (last is not None and last >= count):
                raise ValueError(
                    f"{self.label('tiers')}={self.tiers!r}: the model has layers 0 to {count - 1}. "
                    f"Write '{tier}:{min(first, count - 1)}-' for all up to the last."
                )
            for index in range(first, count if last is None else last + 1):
                tiers[index] = tier
        return tiers

    def every_of_layers(self, count: int) -> list[int]:
        """Numbers of layers that share one input, for each of `count` layers: N of "stream/N", else 1."""
        every = [1] * count
        for part in self._parts:
            for index in range(part.first, min(count, count if part.last is None else part.last + 1)):
                every[index] = part.every
        return every

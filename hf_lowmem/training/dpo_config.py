"""The fields of preference training: which losses are added, how a reference is had, how a batch is laid out.

`DPOConfig.__post_init__` takes a loss type for a string and checks no more; everything here is checked before it runs,
so that a setting that could do nothing is an error before a model is loaded. Which options a loss has and in what range
they may be is written once, in the loss: its keywords are read, and it is called with no pairs to check their values.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from trl import DPOConfig

from hf_lowmem.preference.losses import PREFERENCE_LOSSES, PairLogps
from hf_lowmem.preference.reference import NO_REFERENCE_LOSSES, REFERENCE_FIELDS, check_reference
from hf_lowmem.specs import LossSpec, check_choice, check_flag, check_integer, check_number
from hf_lowmem.training.arguments import LowMemArguments

_TRL_FIELDS = DPOConfig.__dataclass_fields__
# What DPOTrainer's code compares a loss type with; it has no list. tests/house/test_hosts.py reads that code.
TRL_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)

# Fields of DPOConfig that vary TRL's own formulas.
FORMULA_FIELDS = (
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
)
LOSS_OPTIONS = {option for loss in PREFERENCE_LOSSES.values() for option in loss.options}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # TRL's losses that read label_smoothing


def _default_of(option: str) -> str:
    """The defaults of an option by loss, for a help text."""
    taken = [f"{loss.options[option]} ({name})" for name, loss in PREFERENCE_LOSSES.items() if option in loss.options]
    return ", ".join(taken)


@dataclass
class LowMemDPOConfig(LowMemArguments, DPOConfig):
    """`trl.DPOConfig` with the fields of `LowMemArguments`, our losses beside TRL's, and their options.

    ```python
    args = LowMemDPOConfig("out", loss_type="asft", asft_lambda=1.0, optim="apollo", learning_rate=6e-6)
    args = LowMemDPOConfig("out", loss_type=["sigmoid", "orpo"], loss_weights=[1.0, 0.2], lowmem_reference="auto")
    ```

    Raises:
        TypeError, ValueError: naming the field, its value, the reason and the remedy.
    """

    READER: ClassVar[str | None] = "LowMemDPOTrainer"

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"Loss, or several: hf_lowmem's ({', '.join(PREFERENCE_LOSSES)}; they need no reference model) and "
            f"TRL's ({', '.join(TRL_LOSSES)}), added with `loss_weights`."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the implicit reward, of every loss that has one. Default: each loss's own, "
            f"{_default_of('beta')}, {_TRL_FIELDS['beta'].default} (TRL's). After an SFT stage, 0.1 suits asft well."
        },
    )
    asft_lambda: float | None = field(
        default=None,
        metadata={"help": f"Weight of the two alignment terms of asft. Default: {_default_of('asft_lambda')}."},
    )
    orpo_lambda: float | None = field(
        default=None,
        metadata={"help": f"Weight of orpo's odds-ratio term, TRL's `beta`. Default: {_default_of('orpo_lambda')}."},
    )
    simpo_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Target margin of simpo, in units of the reward: the ratio gamma/beta of its authors' scripts "
            f"times beta. Default: {_default_of('simpo_gamma')}."
        },
    )
    cpo_alpha: float | None = field(
        default=None,
        metadata={"help": f"Weight of the behaviour-cloning term of cpo. Default: {_default_of('cpo_alpha')}."},
    )
    lowmem_reference: str | None = field(
        default=None,
        metadata={
            "help": "How a loss that needs a reference model has one: full, adapter (the policy without its adapter), "
            "precomputed (two floats a pair, before training), quantized (4 bits), none; or auto: the one that takes "
            "least memory and is exact. Default: as TRL, adapter with PEFT, else full."
        },
    )
    lowmem_margin_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the reward margin of each pair, r(chosen) - r(rejected) >= 0 by a reward model. Turns "
            "on the dynamic reward scaling of MM-RLHF (arXiv 2502.10391): beta (1 + w (1 - exp(-k margin))). Only for "
            "loss_type='sigmoid'."
        },
    )
    lowmem_margin_w: float | None = field(
        default=None,
        metadata={"help": "w of the dynamic reward scaling: beta grows to (1 + w) beta at most. Default: 0.5."},
    )
    lowmem_margin_k: float | None = field(
        default=None, metadata={"help": "k of the dynamic reward scaling: how fast it saturates. Default: 0.5."}
    )
    lowmem_share_prompt: bool = field(
        default=False,
        metadata={
            "help": "Run each pair's prompt once, with both answers behind it: P + Cw + Cl tokens instead of "
            "2P + Cw + Cl and padding. The same losses and gradients up to rounding; refused for models for which they "
            "would not be."
        },
    )
    lowmem_pack_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With lowmem_share_prompt: put several pairs of a batch into rows of at most this many tokens, as "
            "few as possible, instead of padding. At least twice max_length, so that every pair fits. The time of sdpa "
            "attention grows with the square of a row; flex_attention skips what a token does not see. Default: a "
            "pair a row."
        },
    )

    def __post_init__(self) -> None:
        types: list[str] = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        for name in types:
            check_choice("loss_type", name, [*PREFERENCE_LOSSES, *TRL_LOSSES])
        if len(set(types)) < len(types) or not types:
            said = (
                "names a loss twice. Name each once; loss_weights weighs them" if types else "names no loss. Name one"
            )
            raise ValueError(f"loss_type={types!r} {said}.")
        self.loss_type = types
        self._check_options()
        self._check_formula_fields()
        check_reference(self, self.asking_losses)
        self._check_margins()
        self._check_sharing()
        super().__post_init__()
        # What is logged and saved is what ran; a beta that differs by loss stays unset.
        betas = {self.trl_beta} if self.trl_losses else set()
        none = PairLogps(*[torch.zeros(0)] * 4)
        for spec in self.lowmem_loss_specs():
            PREFERENCE_LOSSES[spec.name](none, **spec.options)  # which checks its options
            betas |= {v for o, v in spec.options.items() if o == "beta"}
            for option in spec.options.keys() - {"beta"}:
                setattr(self, option, spec.options[option])
        if len(betas) == 1:
            self.beta = betas.pop()

    @property
    def trl_losses(self) -> list[str]:
        """Names of the losses that TRL's code computes."""
        return [name for name in self.loss_type if name not in PREFERENCE_LOSSES]

    @property
    def asking_losses(self) -> list[str]:
        """Names of the losses that need a reference model."""
        ours = [n for n in self.loss_type if n in PREFERENCE_LOSSES and PREFERENCE_LOSSES[n].needs_reference]
        return ours + [name for name in self.trl_losses if name not in NO_REFERENCE_LOSSES]

    @property
    def trl_beta(self) -> float:
        """beta of TRL's losses."""
        return _TRL_FIELDS["beta"].default if self.beta is None else self.beta

    def weight_of(self, name: str) -> float:
        """Weight of the loss `name` in the sum."""
        return 1.0 if self.loss_weights is None else self.loss_weights[self.loss_type.index(name)]

    def lowmem_loss_specs(self) -> list[LossSpec]:
        """Our losses with their options, the unset ones at each loss's default."""
        made = []
        for name in self.loss_type:
            if name in PREFERENCE_LOSSES:
                asked = {o: getattr(self, o) for o in PREFERENCE_LOSSES[name].options}
                options = PREFERENCE_LOSSES[name].options | {o: v for o, v in asked.items() if v is not None}
                made.append(LossSpec(name=name, weight=self.weight_of(name), options=options))
        return made

    def _check_options(self) -> None:
        """An option that no loss of the sum takes is refused."""
        for option in sorted(LOSS_OPTIONS):
            takers = [name for name, loss in PREFERENCE_LOSSES.items() if option in loss.options]
            takers += list(TRL_LOSSES) if option == "beta" else []
            if getattr(self, option) is not None and not set(takers) & set(self.loss_type):
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no effect with loss_type={self.loss_type!r}. Leave it "
                    f"unset, or set loss_type={takers[0]!r}" + (f" or another of {takers[1:]}." if takers[1:] else ".")
                )

    def _check_formula_fields(self) -> None:
        """Fields that vary what is not there are refused, and numbers with which TRL's formulas mean nothing."""
        if self.trl_losses:
            check_number("beta", self.trl_beta, low=0.0, low_open=True)
            check_number("label_smoothing", self.label_smoothing, low=0.0, high=0.5)
            if self.label_smoothing and not {*SMOOTHED} & {*self.trl_losses}:
                raise ValueError(
                    f"label_smoothing={self.label_smoothing!r} has no effect with loss_type={self.loss_type!r}. Leave "
                    f"it unset, or set loss_type to one of {', '.join(SMOOTHED)}."
                )
        unread = {} if self.trl_losses else dict.fromkeys(FORMULA_FIELDS, "none of TRL's variants")
        if not self.asking_losses:
            unread |= dict.fromkeys(REFERENCE_FIELDS, "no reference model")
        for name, lacks in unread.items():
            default = _TRL_FIELDS[name].default if name in _TRL_FIELDS else getattr(self, name, None)
            if getattr(self, name, default) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with loss_type={self.loss_type!r}, which needs "
                    f"{lacks}. Leave it unset."
                )

    def _check_margins(self) -> None:
        if self.lowmem_margin_column is None:
            for name in ("lowmem_margin_w", "lowmem_margin_k"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect without lowmem_margin_column. Name the column "
                        "of the dataset that has the reward margins."
                    )
            return
        column = f"lowmem_margin_column={self.lowmem_margin_column!r}"
        if not isinstance(self.lowmem_margin_column, str) or not self.lowmem_margin_column:
            raise TypeError(f"{column}: expected the name of a column of the dataset.")
        others = [name for name in self.trl_losses if name not in ("sigmoid", "sft")]
        if others or "sigmoid" not in self.trl_losses:
            raise ValueError(
                f"{column} scales beta of DPO's own loss, loss_type='sigmoid', and "
                + (f"is not defined for {others[0]!r}." if others else f"loss_type={self.loss_type!r} is without it.")
                + " Leave it unset, or set loss_type='sigmoid'."
            )
        self.lowmem_margin_w = 0.5 if self.lowmem_margin_w is None else self.lowmem_margin_w
        self.lowmem_margin_k = 0.5 if self.lowmem_margin_k is None else self.lowmem_margin_k
        check_number("lowmem_margin_w", self.lowmem_margin_w, low=0.0, low_open=True)
        check_number("lowmem_margin_k", self.lowmem_margin_k, low=0.0, low_open=True)

    def _check_sharing(self) -> None:
        check_flag("lowmem_share_prompt", self.lowmem_share_prompt)
        if self.lowmem_pack_tokens is not None:
            check_integer("lowmem_pack_tokens", self.lowmem_pack_tokens, low=1)
            if not self.lowmem_share_prompt:
                raise ValueError(
                    f"lowmem_pack_tokens={self.lowmem_pack_tokens!r} has no effect without lowmem_share_prompt=True. "
                    "Set both, or leave it unset."
                )
            if self.max_length is not None and self.lowmem_pack_tokens < 2 * self.max_length:
                raise ValueError(
                    f"lowmem_pack_tokens={self.lowmem_pack_tokens!r} with max_length={self.max_length!r}: a pair may "
                    f"have up to {2 * self.max_length} tokens and would fit into no row. Raise lowmem_pack_tokens to "
                    "that, or lower max_length."
                )

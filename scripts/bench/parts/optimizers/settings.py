"""What the quality run compares: one line a setting, and the learning rates that are tried for each method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Rungs a factor 3 apart. A method starts with the three around its place; while the best is an outer one, the next rung
# on that side is tried too, at most MOST_RATES in all.
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
MOST_RATES = 6
MIDDLE_RATE = {
    "adamw": 3e-3,
    "adam_mini": 3e-3,
    "lion": 3e-4,
    "lamb": 1e-2,
    "soap": 3e-3,
    "muon": 3e-3,
    "scale": 1e-3,
    "galore": 1e-2,
    "fira": 1e-2,
    "apollo": 3e-3,
    "apollo_mini": 3e-3,
    "natural_galore": 1e-2,
}

# A quarter of the smaller side of every linear weight of the model, as 1024-wide models take 256; five bases in a run.
RANK, UPDATE_GAP = 32, 50
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": RANK, "update_gap": UPDATE_GAP},
    "fira": {"rank": RANK, "update_gap": UPDATE_GAP},
    "apollo": {"rank": RANK, "update_gap": UPDATE_GAP},
    "apollo_mini": {"update_gap": UPDATE_GAP},
    "natural_galore": {"rank": RANK, "update_gap": UPDATE_GAP},
}


@dataclass(frozen=True)
class Setting:
    """One row of the record.

    method, state, extra: as `make_optimizer` takes them.
    weights: "fp32", or one of four ways to train with bf16 weights (see `quality.py`).
    rate_factor: times the method's tuned learning rate.
    control: the fp32 run again from weights that differ in their last bits: how far apart two runs end that no codec
        tells apart.
    """

    method: str
    state: str = "fp32"
    extra: dict[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    rate_factor: float = 1.0
    control: bool = False

    @property
    def name(self) -> str:
        parts = [self.method, self.state, *(f"{k}={v}" for k, v in self.extra.items())]
        if self.weights != "fp32":
            parts.append(f"weights={self.weights}")
        if self.rate_factor != 1.0:
            parts.append(f"lr×{self.rate_factor:g}")
        return " ".join([*parts, *(["control"] if self.control else [])])

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `make_optimizer`, without learning rate, seed, state and weights."""
        return METHOD_OPTIONS.get(self.method, {}) | self.extra


CODECS: dict[str, Sequence[str]] = {
    "adamw": ("fp32", "bf16", "int8", "int8_softsign", "fp8", "fp8_expand", "int4", "8bit"),
    "adam_mini": ("fp32", "8bit"),
    "lion": ("fp32", "int8", "int8_softsign", "int4"),  # one signed state: of a pair, the first
    "lamb": ("fp32", "8bit"),
    "soap": ("fp32", "8bit"),
    "muon": ("fp32", "8bit"),
    "scale": ("fp32", "8bit"),
    "galore": ("fp32", "8bit", "fp8_expand"),
    "fira": ("fp32", "8bit"),
    "apollo": ("fp32", "8bit", "int4"),
    "apollo_mini": ("fp32", "8bit"),
    "natural_galore": ("fp32", "8bit"),
}
PAIRS = ("int8,fp8_expand",)  # "8bit" is int8_softsign,fp8_expand: what its first moment's codec brings

# Half a bf16 unit of a weight of 0.02 is 6e-5: a step below it is lost by rounding to nearest. At a third of the tuned
# rate most steps are; all four stores run at the same rate.
STORE_RATE_FACTOR = 1 / 3
STORES = ("masters", "keep", "bf16_sr", "bf16_ecc")

# What Q-GaLore adds to GaLore: 250 steps have five bases, or fewer where refreshes are lazy. The first is what the
# others are compared with, and is named so that it is run beside them: rows without a name are of older code.
BASES: tuple[dict[str, object], ...] = ({"basis": "fp32"}, {"basis": "int4"}, {"lazy_overlap": 0.5})
OF_BASES = ("galore", "fira")

SETTINGS: list[Setting] = [
    *(Setting(method, codec) for method, codecs in CODECS.items() for codec in codecs),
    *(Setting("adamw", pair) for pair in PAIRS),
    Setting("galore", extra={"projection": "svd"}),
    Setting("galore", extra={"projection": "random"}),
    Setting("galore", extra={"rotate": True}),
    *(Setting(method, extra=extra) for method in OF_BASES for extra in BASES),
    *(Setting("adamw", weights=store, rate_factor=STORE_RATE_FACTOR) for store in STORES),
    *(Setting(method, control=True) for method in ("adamw", "galore")),
]

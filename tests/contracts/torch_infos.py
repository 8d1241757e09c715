"""Every optimizer of the house as torch's own tests describe one: its class, settings, schedules, bad settings."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer

SCHEDULES: list[list[Callable[[Any], Any]]] = [
    [lambda o: schedules.StepLR(o, gamma=0.9, step_size=10), lambda o: schedules.ReduceLROnPlateau(o)],
    [lambda o: schedules.LinearLR(o, start_factor=0.4, total_iters=4), lambda o: schedules.ExponentialLR(o, gamma=0.9)],
    [lambda o: schedules.CosineAnnealingLR(o, T_max=30)],
    [lambda o: schedules.OneCycleLR(o, max_lr=2e-3, total_steps=30)],  # it cycles betas[0] too
]


def inputs_of(cls: type[LowMemOptimizer]) -> Callable[..., list[OptimizerInput]]:
    """Settings to try, all with a rank and a gap that give a low-rank method work on small weights."""
    own = {k: v for k, v in {"rank": 3, "update_gap": 3}.items() if cls.DEFAULTS.get(k, 0) > v}
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 2e-3},
        "weight_decay": {"weight_decay": 0.1},
        "tensor lr": {"lr": torch.tensor(1e-3)},
        "betas": {"betas": (0.7, 0.8)},
    }

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        return [OptimizerInput(None, own | copy.deepcopy(v), k) for k, v in settings.items()]  # type: ignore[arg-type]

    return inputs


def errors_of(cls: type[LowMemOptimizer]) -> Callable[..., list[ErrorOptimizerInput]]:
    bad: dict[str, Any] = {"lr": -1.0, "betas": (1.0, 0.5), "weight_decay": -1.0, "state": "int3", "seed": -1}
    bad |= {k: -1.0 for k in ("eps", "scale") if k in cls.DEFAULTS}
    bad |= {k: 0 for k in ("rank", "update_gap") if k in cls.DEFAULTS}

    def errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
        ours = [
            ErrorOptimizerInput(OptimizerInput(None, {k: v}, k), error_type=ValueError, error_regex=k)  # type: ignore[arg-type]
            for k, v in bad.items()
        ]
        return get_error_inputs_for_all_optims(device, dtype) + ours

    return errors


INFOS = [
    OptimizerInfo(
        cls,  # type: ignore[arg-type]
        optim_inputs_func=inputs_of(cls),
        optim_error_inputs_func=errors_of(cls),
        scheduler_inputs=tuple(SCHEDULES),  # type: ignore[arg-type]
        supported_impls=(),
        supports_complex=False,
    )
    for cls in OPTIMIZERS.values()
]
CASES = [(info, i) for info in INFOS for i in info.optim_inputs_func(device="cpu")]
every_class = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
every_input = pytest.mark.parametrize(("info", "case"), CASES, ids=[f"{o.name}-{i.desc}" for o, i in CASES])
# Nothing at its default. For what does not hang on one setting: a file, a copy, a step without gradients.
EVERYTHING = {"lr": torch.tensor(1e-3), "weight_decay": 0.1, "betas": (0.7, 0.8)}
TOGETHER = [
    (info, OptimizerInput(None, info.optim_inputs_func(device="cpu")[0].kwargs | EVERYTHING, "all"))  # type: ignore[arg-type]
    for info in INFOS
]
all_at_once = pytest.mark.parametrize(("info", "case"), TOGETHER, ids=[info.name for info, _ in TOGETHER])


class Problem:
    """torch's: the square of a linear map, with a weight and a bias to find."""

    def __init__(
        self, contiguous: bool = True, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(12, 8, generator=generator)
        if not contiguous:
            weight = torch.randn(12, 8, 2, generator=generator)[..., 0]
        self.weight = nn.Parameter(weight.to(dtypes[0]))
        self.bias = nn.Parameter(torch.randn(12, generator=generator).to(dtypes[1]))
        self.input = torch.randn(8, generator=generator)
        self.params = [self.weight, self.bias]
        self.start = self.values()

    def loss(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = (self.weight.float().mv(self.input) + self.bias.float()).pow(2).sum()
        loss.backward()
        return loss.detach()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def make(info: OptimizerInfo, params: Any, case: OptimizerInput | None = None, **settings: Any) -> Any:
    case = case or info.optim_inputs_func(device="cpu")[0]
    cls: Any = info.optim_cls
    return cls(params, **copy.deepcopy(case.kwargs) | settings)  # a schedule writes into a tensor lr


def train(optimizer: Any, problem: Problem, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.step(problem.loss)


def trained(info: OptimizerInfo, case: OptimizerInput | None = None, steps: int = 5) -> tuple[Problem, Any]:
    problem = Problem()
    optimizer = make(info, problem.params, case)
    train(optimizer, problem, steps)
    return problem, optimizer

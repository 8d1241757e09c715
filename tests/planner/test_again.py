"""Updates that a plan logs once for all that are alike: the log is that of running every one."""

import tempfile
from unittest import mock

import pytest
import torch

from hf_lowmem import LowMemSFTConfig
from hf_lowmem.planner import step
from hf_lowmem.planner.allocations import Live
from hf_lowmem.planner.methods import method_of
from tests.planner.real import small_config

Log = tuple[object, ...]
SETTINGS = [
    ("apollo", "8bit", "int8_sr", True),
    ("soap", "fp32", "bf16_sr", False),
    *(
        pytest.param(*more, marks=pytest.mark.slow)
        for more in (
            ("galore", "int4", "bf16_sr", True),
            ("adamw", "int4", "bf16_ecc", False),
            ("muon", "8bit", "bf16_sr", True),
            ("scale", "8bit", "bf16_sr", True),
            ("lion", "int4", "bf16_sr", True),
            ("natural_galore", "int8", "bf16_sr", True),
            ("lamb", "8bit", "bf16_sr", True),
            ("fira", "8bit", "bf16_sr", False),
            ("adam_mini", "8bit", "bf16_sr", False),
        )
    ),
]


def log_of(args: LowMemSFTConfig) -> tuple[Log, int]:
    """All that a simulation has logged, and how many updates were not run."""
    with mock.patch.object(Live, "repeat", autospec=True, side_effect=Live.repeat) as repeated:
        measured = step.simulate_step(
            small_config(num_hidden_layers=3), args, method_of(args), dtype=torch.bfloat16, attention=None
        )
    live = measured.live
    deaths = [at if at <= measured.end else -1 for at in live.deaths]  # the model's own come when Python collects it
    rows = live.births, deaths, live.sizes, live.owners, live.widths, live.marks, live.places
    return (*rows, measured.start, measured.end, measured.states, measured.gradients), repeated.call_count


@pytest.mark.train
@pytest.mark.parametrize(("optim", "state", "weights", "in_backward"), SETTINGS)
def test_the_log_is_that_of_running_every_update(optim: str, state: str, weights: str, in_backward: bool) -> None:
    args = LowMemSFTConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=32,
        per_device_train_batch_size=1,
        optim=optim,
        lowmem_state=state,
        lowmem_weights=weights,
        lowmem_step_in_backward=in_backward,
        max_grad_norm=0.0 if in_backward else 1.0,
    )
    once, repeats = log_of(args)
    with mock.patch.object(step, "logged_once", lambda run, live: run):
        each, none = log_of(args)
    assert once == each
    assert repeats > 7 > none == 0, "of the matrices of two layers"


def test_what_outlives_an_update_is_not_repeated() -> None:
    live = Live(invent_numbers=False)
    with live:
        older = torch.zeros(3)
        first, began = len(live.births), live.clock
        (torch.ones(4) + 1).sum()
        assert live.events(first, began) is not None
        newer = torch.zeros(5)
        assert live.events(first, began) is None
        del newer
        assert live.events(first, began) is not None
        del older
        assert live.events(first, began) is None

"""The report of what is saved: whose it is, and for how long."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowmem.memory import SavedReport, human_bytes, measure_saved
from tests.memory.models import mlp, mlp_step


def test_attribution_is_to_the_innermost_module():
    model = mlp()
    with measure_saved(model) as saved:
        loss = mlp_step(model)()
    sizes = {
        "0": 3 * 8,
        "1": 3 * 16,
        "2": 3 * 16 + 6,
        "3": 3 * 16,
        "4": 3 * 16,
        "(outside any module)": 3 * 4,
    }
    assert saved.by_module == {name: 4 * n for name, n in sizes.items()}
    with measure_saved() as saved:
        loss = mlp_step(model)()
    assert saved.by_module["Linear"] == 4 * (sizes["0"] + sizes["4"])
    del loss


def test_table_names_sizes_and_the_rest():
    model = mlp()
    with measure_saved(model) as saved:
        loss = mlp_step(model)()
    assert "(3 more)" in saved.table(rows=3)
    assert str(saved).splitlines()[-1].split()[-2:] == human_bytes(saved.peak).split()
    assert "peak=" in repr(saved)
    del loss


def test_shares_are_of_the_peak_and_of_now():
    x = torch.randn(10, requires_grad=True)
    with measure_saved(layer := nn.Tanh()) as saved:
        y, z = layer(x), x.sin()
        assert saved.by_module == saved.by_module_now == {"Tanh": 40, "(outside any module)": 40}
        del z
        assert saved.by_module == {"Tanh": 40, "(outside any module)": 40}
        assert saved.by_module_now == {"Tanh": 40}
    del y
    assert saved.by_module_now == {"Tanh": 40}


def test_freed_graphs_do_not_count():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    with measure_saved(layer) as saved:
        for _ in range(5):
            y = layer(x.clone())
        assert saved.total == 3 * 8 * 4
    # The fifth graph is built before the fourth is let go.
    assert saved.peak == 2 * 3 * 8 * 4
    del y


def test_the_report_is_frozen_at_exit():
    layer = nn.Linear(8, 8)
    with measure_saved(layer) as saved:
        y = layer(torch.randn(3, 8))
    del y
    z = layer(torch.randn(3, 8))
    assert saved.total == saved.peak == 3 * 8 * 4
    del z


def test_a_shared_storage_stays_until_its_last_holder_goes():
    x = torch.randn(10, requires_grad=True)
    with measure_saved() as saved:
        a, b = x.sin(), x.cos()
        del a
        assert saved.total == 40
        del b
        assert saved.total == 0


def test_addresses_handed_out_again_are_counted_again():
    x = torch.randn(1000, requires_grad=True)
    with measure_saved() as saved:
        for _ in range(50):
            y = (x * 1).sin()  # sin keeps x * 1, freed with the graph and allocated anew
            assert saved.total == 4000
            del y


def test_attribution_survives_an_exception_that_is_caught():
    class Boom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("boom")

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boom = Boom()

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(KeyError):
                self.boom(x)
            return x.sin()

    with measure_saved(model := nn.Sequential(Careful())) as saved:
        y = model(torch.randn(10, requires_grad=True))
    assert saved.by_module == {"0": 40}
    del y


def test_a_module_entered_before_measuring():
    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with measure_saved() as self.saved:
                return F.relu(nn.Tanh()(x)) * 2

    outer = Outer()
    y = outer(torch.randn(10, requires_grad=True))
    assert outer.saved.by_module == {"Tanh": 40, "(outside any module)": 40}
    del y


def test_threads_each_have_their_own_innermost_module():
    x = torch.randn(10, requires_grad=True)
    inside, checked = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            inside.set()
            assert checked.wait(10)
            return t

    with measure_saved() as saved:
        worker = threading.Thread(target=Slow(), args=(x,))
        worker.start()
        assert inside.wait(10)
        y = x.sin()
        checked.set()
        worker.join()
    assert saved.by_module == {"(outside any module)": 40}
    del y


def test_an_empty_report():
    report = SavedReport()
    assert (report.total, report.peak, report.by_module) == (0, 0, {})
    assert "0 B" in str(report)

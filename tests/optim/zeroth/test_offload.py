"""Layers in host memory: the same training bit for bit, one trip a step, and two layers on the device at most."""

import contextlib
import copy
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.optim import ZEROTH, ZerothOrder, make_optimizer
from hf_lowmem.optim.zeroth import bring_back, host_layers_of, put_in_host
from hf_lowmem.planner.allocations import Live
from tests.optim.zeroth.nets import BATCH, RATES, Net

STATELESS = [name for name in ZEROTH if not ZEROTH[name].STATES]


def build(*, offload: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> Net:
    model = Net(**settings).to(dtype)
    if offload:
        put_in_host(model, "cpu")
    return model.to("cpu")


def make(model: Net, name: str = "mezo", **settings: Any) -> ZerothOrder:
    made = make_optimizer(name, model, **{"lr": RATES[name], **settings})
    assert isinstance(made, ZerothOrder)
    return made


def run(model: Net, optimizer: ZerothOrder, steps: int, first: int = 0) -> None:
    """Steps with a learning rate of their own, which an update that waits must not exchange for the next one's."""
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[optimizer.name] * (1 + step)
        optimizer.step(lambda: model.loss(BATCH).detach())
        model.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weights", ["keep", "bf16_sr"])
@pytest.mark.parametrize("name", STATELESS)
def test_it_is_the_training_without_bit_for_bit(name: str, weights: str) -> None:
    """With dropout, whose numbers are where they would be, too."""
    ends, drawn = [], []
    for offload in (False, True):
        dtype = torch.bfloat16 if weights == "bf16_sr" else torch.float32
        model = build(offload=offload, dtype=dtype, dropout=0.3, layers=3, width=32)
        optimizer = make(model, name, weights=weights)
        torch.manual_seed(1)
        run(model, optimizer, 3)
        drawn.append(torch.rand(4))
        ends.append(values(model))
    assert same(*ends)
    assert torch.equal(*drawn)


def test_a_layer_comes_once_a_step_and_its_update_waits_there() -> None:
    model = build(offload=True, layers=3)
    store = host_layers_of(model)
    assert store is not None
    assert len(store.blocks) == 3
    optimizer = make(model)
    start = [p.detach().clone() for block in store.blocks for p in block.parameters()]
    run(model, optimizer, 4)
    assert store.visits == 4 * 3
    assert all(len(block.updates) == 4 for block in store.blocks)
    optimizer.settle()
    assert store.visits == 5 * 3
    assert not any(block.updates for block in store.blocks)
    assert not any(map(torch.equal, start, (p.detach() for block in store.blocks for p in block.parameters())))


READS: dict[str, Any] = {
    "state_dict": lambda model: model.state_dict()["layers.0.up.weight"],
    "parameters": lambda model: dict(model.named_parameters())["layers.0.up.weight"],
    "attribute": lambda model: model.layers[0].up.weight,
    "of the layer": lambda model: next(model.layers[0].parameters()),
    "a copy": lambda model: copy.deepcopy(model).layers[0].up.weight,
    "a layer's own pass": lambda model: model(BATCH) is not None and model.layers[0].up.weight,
}


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_a_weight_gets_it_updated(read: str) -> None:
    model, plain = build(offload=True), build(offload=False)
    for each in (model, plain):
        run(each, make(each), 2)
    with torch.no_grad():
        assert torch.equal(READS[read](model), plain.layers[0].up.weight)  # type: ignore[union-attr]


def test_it_goes_on_from_a_file() -> None:
    model = build(offload=True, width=32)
    optimizer = make(model, seed=3)
    run(model, optimizer, 2)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    run(model, optimizer, 2, first=2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for offload in (True, False):
        resumed = build(offload=offload, width=32)
        resumed.load_state_dict(saved["model"])
        again = make(resumed, seed=3)
        again.load_state_dict(saved["optimizer"])
        run(resumed, again, 2, first=2)
        assert same(values(resumed), values(model)), offload


def test_micro_batches_of_a_window_add_up() -> None:
    ends = []
    for offload in (False, True):
        model = build(offload=offload)
        optimizer = make(model)
        for _ in range(2):
            for part in BATCH.chunk(3):
                optimizer.probe(lambda part=part, model=model: model.loss(part).detach() / 3)
            optimizer.step()
        ends.append(values(model))
    assert same(*ends)


def test_a_pass_of_evaluation_is_the_same_and_leaves_weights_there() -> None:
    model, plain = build(offload=True), build(offload=False)
    for each in (model, plain):
        run(each, make(each), 1)
    store = host_layers_of(model)
    assert store is not None
    with torch.no_grad():
        assert torch.equal(model(BATCH), plain(BATCH))
    assert not any(block.near for block in store.blocks)
    assert not any(block.updates for block in store.blocks)


def peak(*, offload: bool, layers: int) -> int:
    """Bytes at once beside the weights that lie where they lie, in a step with an update that has waited."""
    model = build(offload=offload, layers=layers, width=1024)
    optimizer = make(model)
    run(model, optimizer, 1)
    with Live(invent_numbers=False) as live:
        run(model, optimizer, 1, first=1)
        own = live.rows_of(p.detach() for p in model.parameters())
    rows = [row for i, row in enumerate(zip(live.births, live.deaths, live.sizes, strict=True)) if i not in own]
    events = [(birth, size) for birth, _, size in rows]
    events += [(death, -size) for _, death, size in rows if death >= 0]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def test_the_device_has_two_layers_and_what_passes_make_of_one() -> None:
    """Counted in a trace of allocations, without the memory that was there before. Beside two layers it is the
    perturbed embedding and the hidden states of the pass that waits."""
    layer = 4 * (2 * 16 * 1024 + 16 + 1024)
    few, many = peak(offload=True, layers=3), peak(offload=True, layers=9)
    assert few == many
    assert few - peak(offload=False, layers=3) == 2 * layer + 4 * 12 * 1024 + 4 * len(BATCH) * 1024


def test_the_error_of_a_pass_ends_all_of_them() -> None:
    model = build(offload=True)
    optimizer = make(model)
    run(model, optimizer, 1)
    before, threads, count = values(model), threading.active_count(), 0

    def fails() -> Tensor:
        nonlocal count
        count += 1
        loss = model.loss(BATCH)
        if count > 1:
            raise KeyError("at the end of the first pass")
        return loss

    with pytest.raises(KeyError):
        optimizer.probe(fails)
    assert threading.active_count() == threads
    assert same(values(model), before)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)
    optimizer.zero_grad()
    run(model, optimizer, 1)


def test_what_a_thread_has_of_its_own_is_its_caller_s() -> None:
    model = build(offload=True)
    seen: list[tuple[bool, torch.dtype, bool]] = []

    def loss() -> Tensor:
        logits = model(BATCH)
        seen.append((torch.is_autocast_enabled("cpu"), logits.dtype, torch.is_grad_enabled()))
        return logits.float().mean().detach()

    with torch.autocast("cpu", torch.bfloat16):
        make(model).step(loss)
    assert seen == 2 * [(True, torch.bfloat16, False)]


def test_moving_and_casting_the_model_leaves_its_layers_in_host_memory() -> None:
    model, plain = build(offload=True), build(offload=False)
    for each in (model, plain):
        run(each, make(each), 1)
        each.to(torch.float64)
        optimizer = make(each)
        run(each, optimizer, 1)
    assert same(values(model), values(plain))
    meta = copy.deepcopy(model).to("meta")
    assert all(p.device.type == "meta" for p in meta.parameters()), "a copy is a plain model"
    model.to("meta")
    assert {p.device.type for p in model.layers.parameters()} == {"cpu"}
    assert model.embed.weight.device.type == "meta"


def test_layers_are_brought_back() -> None:
    model, plain = build(offload=True), build(offload=False)
    for each in (model, plain):
        optimizer = make(each)
        run(each, optimizer, 2)
        bring_back(each)
        run(each, optimizer, 2, first=2)
    assert same(values(model), values(plain))
    assert host_layers_of(model) is None
    assert all("forward" not in vars(m) and "_apply" not in vars(m) for m in model.modules())
    assert all(type(m._parameters) is dict for m in model.modules())
    model.loss(BATCH).backward()
    assert all(p.grad is not None for p in model.parameters())


class Skips(Net):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(ids)))


class Shares(Net):
    def __init__(self) -> None:
        super().__init__()
        first, second = self.layers
        second.up, second.down = first.up, first.down  # type: ignore[union-attr]


def whole_numbers() -> nn.Module:
    model = Net()
    model.layers[0].up.weight = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    return model


def probed(model: nn.Module, name: str = "mezo", **settings: Any) -> None:
    put_in_host(model, "cpu")
    optimizer = make_optimizer(name, model, **settings)
    assert isinstance(optimizer, ZerothOrder)
    optimizer.probe(lambda: model(BATCH).float().mean())


REFUSED: dict[str, tuple[Any, str]] = {
    "a backward pass": (lambda: build(offload=True).loss(BATCH), "Run it under torch.no_grad"),
    "states": (lambda: probed(Net(), "zo_adam"), "states of 'zo_adam' would stay on the device"),
    "corrections": (lambda: probed(Net().bfloat16(), weights="bf16_ecc"), "weights='bf16_ecc' of 'mezo' would stay"),
    "a layer left out": (lambda: probed(Skips()), "was not entered in a forward pass"),
    "no layers": (lambda: put_in_host(nn.Linear(2, 2), "cpu"), "Linear has no list of layers"),
    "one layer twice": (lambda: put_in_host(Shares(), "cpu"), "no list of layers with weights of their own"),
    "codes": (lambda: put_in_host(whole_numbers(), "cpu"), "Load the model without quantization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case: str) -> None:
    act, said = REFUSED[case]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        act()
    assert said in str(caught.value)
    assert "host memory" in str(caught.value) or "lowmem_offload='weights'" in str(caught.value)


class Stream:
    """What a CUDA stream is told, in order."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> "Event":
        self.told.append(f"{self.name} records")
        return Event(self)

    def wait_event(self, event: "Event") -> None:
        self.told.append(f"{self.name} waits for a copy {event.stream.name}")


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.told.append(f"the host waits for a copy {self.stream.name}")


def test_streams_wait_for_each_other_and_the_host_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers in a step whose updates have waited. Memory on the device is used, and given up, after the
    computing stream was told to wait for the copy; a layer is read after it was written."""
    told: list[str] = []
    computing = Stream("compute", told)

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", within)
    model = build(offload=True)
    store = host_layers_of(model)
    assert store is not None
    store.down, store.up = Stream("down", told), Stream("up", told)  # type: ignore[assignment]
    optimizer = make(model)
    fetched = ["down waits for compute", "down records"]
    run(model, optimizer, 1)
    first = [*fetched, "compute waits for a copy down", *fetched, "compute waits for a copy down"]
    assert told == first
    told.clear()
    written = ["up waits for compute", "up records"]
    run(model, optimizer, 1)
    assert told == [
        *fetched, "compute waits for a copy down", *fetched, *written, "compute waits for a copy up",
        "compute waits for a copy down", *written, "compute waits for a copy up",
    ]  # fmt: skip
    told.clear()
    run(model, optimizer, 1)
    again = ["down waits for compute", "down waits for a copy up", "down records"]
    assert told[:3] == again
    assert "the host" not in " ".join(told)
    told.clear()
    model.state_dict()
    assert told[-1] == "the host waits for a copy up"
    assert told.count("the host waits for a copy up") == 2

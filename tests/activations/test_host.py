"""Inputs of layers in host memory: the same gradients, one copy near the device, memory that is taken once."""

import contextlib
import copy
import itertools
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lowmem.activations import convert, host, undo
from hf_lowmem.activations.blocks import patches
from hf_lowmem.activations.formats import nbytes
from hf_lowmem.activations.host import HostStore
from hf_lowmem.memory import host as memory_host
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import batch, build, loss_and_gradients

LAYERS = 4
INPUT = 2 * 24 * 64  # values of a layer's input in a batch


def converted(offload: str | None = "inputs", family: str = "llama", **spec: Any) -> Any:
    model = build(family, dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    fields: dict[str, Any] = {"tiers": "checkpoint_fp8", "offload": offload, "seed": 0} | spec
    convert(model, ActivationSpec(**fields))
    return model


def stores_of(model: Any) -> list[HostStore]:
    return [store for patch in patches(model) if (store := getattr(patch, "store", None)) is not None]


def store_of(model: Any) -> HostStore:
    return stores_of(model)[0]


def same(ours: Any, theirs: Any) -> None:
    (loss, grads), (other, expected) = ours, theirs
    assert torch.equal(loss, other)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"stochastic": True},
        {"tiers": "fp8:0-0,checkpoint_fp8:1-"},
        {"tiers": "stream_fp8", "chunk": 7, "stochastic": True},
        {"tiers": "stream", "chunk": 7},
    ],
    ids=["all", "stochastic", "some", "stream_fp8", "stream"],
)
def test_gradients_are_equal_bit_for_bit(family: str, spec: dict[str, Any]) -> None:
    """Mixtral's inputs are kept as they are: its tokens are routed."""
    ours, theirs = converted(family=family, **spec), converted(None, family=family, **spec)
    for _ in range(2):
        same(loss_and_gradients(ours, batch()), loss_and_gradients(theirs, batch()))


def test_graphs_may_live_together_and_run_twice() -> None:
    def run(model: Any) -> list[Any]:
        losses = [model(**batch(tokens)).loss for tokens in (24, 8, 16)]
        for loss in (losses[1], losses[0], losses[2]):  # in no order of theirs
            loss.backward(retain_graph=True)
        losses[0].backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, run(converted()), run(converted(None))))


class Watched(host._Lane):
    """A lane that notes what is copied: out, back."""

    copies: list[str] = []

    def copy(self, kept: Any, parts: Any, pairs: Any) -> None:
        assert self.near is None  # what was there is let go before
        pairs = list(pairs)
        self.copies.append("out" if pairs[0][0] is kept.host[0] else "back")
        super().copy(kept, parts, iter(pairs))


def test_each_input_goes_out_once_and_all_but_the_last_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_Lane", Watched)
    monkeypatch.setattr(Watched, "copies", [])
    model = converted()
    for _ in range(2):
        loss_and_gradients(model, batch())
    assert Watched.copies == (["out"] * LAYERS + ["back"] * (LAYERS - 1)) * 2
    assert all(lane.near is None for lane in store_of(model)._lanes.values())


def test_the_graph_keeps_nothing_of_the_inputs() -> None:
    totals = []
    for model in (converted(), converted(None)):
        with measure_saved(model) as saved:
            loss = model(**batch()).loss
            totals.append(saved.total)
        del loss
    assert totals[1] - totals[0] == LAYERS * nbytes((2, 24, 64), "e4m3", torch.bfloat16)


@pytest.mark.parametrize("tier", ["stream", "stream_fp8"])
def test_streamed_layers_keep_their_inputs_in_host_memory(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_Lane", Watched)
    monkeypatch.setattr(Watched, "copies", [])
    model = converted(tiers=tier, chunk=7)
    with measure_saved(model) as saved:
        loss = model(**batch()).loss
    kept = saved.total
    loss.backward()
    assert Watched.copies == ["out"] * LAYERS + ["back"] * (LAYERS - 1)
    plain = converted(None, tiers=tier, chunk=7)
    with measure_saved(plain) as saved:
        loss = plain(**batch()).loss
    fmt = "none" if tier == "stream" else "e4m3"
    assert saved.total - kept == LAYERS * nbytes((2, 24, 64), fmt, torch.bfloat16)


def test_memory_is_taken_once_and_grows_with_the_longest() -> None:
    model = converted()
    store = store_of(model)
    one = INPUT + 2 * 2 * 24  # codes, and a scale a token: whole multiples of ALIGNMENT here
    for _ in range(3):
        loss_and_gradients(model, batch())
        assert store.nbytes == LAYERS * -(-one // 64) * 64
    before = store.nbytes
    for tokens in (7, 40, 24, 31):
        loss_and_gradients(model, batch(tokens))
    assert store.nbytes < 2 * before
    loss_and_gradients(model, batch(40))
    free = len(store._free) + len(store._returned)
    assert free == LAYERS
    undo(model)


def test_a_host_without_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths of what is available are enough for one process, and not for two."""
    available = int(LAYERS * (INPUT + 128) / memory_host.SHARE) + 64
    monkeypatch.setattr(memory_host, "free_bytes", lambda device: available)
    loss_and_gradients(converted(), batch())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = r"lowmem_offload='inputs'.*in each of 2 processes.*leave lowmem_offload unset"
    with pytest.raises(ValueError, match=words):
        loss_and_gradients(converted(), batch())


def test_a_copy_of_a_model_has_a_store_of_its_own() -> None:
    model = converted()
    loss_and_gradients(model, batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(store is store_of(twin) for store in stores_of(twin))
        assert store_of(twin) is not store_of(model)
        assert (store_of(twin).layers, store_of(twin).nbytes) == (LAYERS, 0)
        same(loss_and_gradients(twin, batch()), loss_and_gradients(model, batch()))


def test_what_is_changed_while_it_is_copied_is_an_error() -> None:
    store, x = HostStore(1), torch.ones(3)
    store.put((x,))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        store.put((torch.ones(3),))


def test_pinned_memory_is_whole_pages_of_its_own_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        assert address % memory_host.PAGE == size % memory_host.PAGE == 0
        pinned[address] = size
        return 0 if size < 2**20 else 2

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    device = torch.device("cuda", 0)
    buffers = [
        memory_host.buffer_of(n, device, "a field") for n in (1, 100, memory_host.PAGE, 3 * memory_host.PAGE + 1)
    ]
    assert [b.nbytes for b in buffers] == [1, 100, memory_host.PAGE, 3 * memory_host.PAGE + 1]
    spans = sorted((address, address + size) for address, size in pinned.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for buffer in buffers:
        assert pinned[buffer.data_ptr()] >= buffer.nbytes
    del buffer, buffers
    assert not pinned
    with pytest.raises(RuntimeError, match=r"1\.00 MiB of host memory could not be pinned \(CUDA error 2\)"):
        memory_host.buffer_of(2**20, device, "a field")


class Stream:
    """What a CUDA stream is told, in order."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.told.append(f"{self.name} records")
        return "event"

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for the copy")

    def synchronize(self) -> None:
        self.told.append(f"the host waits for {self.name}")


def test_streams_wait_for_each_other_and_the_host_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place on the device is given up, and read, after the computing stream was told to wait for its copy."""
    told: list[str] = []
    computing = Stream("compute", told)

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        told.append("copy {")
        yield
        told.append("}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", within)
    store = HostStore(2)
    store.lane(torch.device("cpu")).stream = Stream("copies", told)  # type: ignore[assignment]
    copying = ["copies waits for compute", "copy {", "copies records", "}"]
    first = store.put((torch.ones(3),))
    assert told == copying
    told.clear()
    second = store.put((torch.zeros(3),))
    assert told == ["compute waits for the copy", *copying]
    told.clear()
    assert second.get()[0].sum() == 0  # is still there; the first is on its way
    assert told == ["compute waits for the copy", *copying]
    told.clear()
    assert first.get()[0].sum() == 3
    assert told == ["compute waits for the copy"]

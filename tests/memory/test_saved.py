"""Saved tensors against counts by hand, and against a counter that knows nothing of hooks."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_lowmem.memory import measure_saved, parameter_bytes
from tests.memory.models import BATCH, HEADS, HIDDEN, LAYERS, TOKENS, llama, llama_step, mlp, mlp_step


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_garbage():
    gc.freeze()  # or every gc.collect() walks through all of transformers, a third of a second each
    yield
    gc.unfreeze()


class Alive(TorchDispatchMode):
    """Every storage an op has made that is still alive, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def nbytes(self, but: list[Tensor]) -> int:
        gc.collect()
        skip = {t.untyped_storage()._cdata for t in but}
        return sum(n for key, (ref, n) in self.made.items() if ref() is not None and key not in skip)


def alive_after(step: Callable[[], Tensor], model: nn.Module) -> int:
    with Alive() as alive:
        loss = step()
    return alive.nbytes([loss, *model.parameters(), *model.buffers()])


def saved_after(step: Callable[[], Tensor], model: nn.Module | None) -> int:
    with measure_saved(model) as saved:
        loss = step()
    total = saved.total
    assert sum(saved.by_module.values()) == saved.peak
    del loss
    return total


# Counted by hand, 4 bytes each; x is (3, 8). Dropout on a CPU keeps its mask, scaled and in the input's dtype; in eval
# mode BatchNorm normalises with the running statistics, which are buffers.
@pytest.mark.parametrize(
    ("layer", "values"),
    [
        (nn.Linear(8, 16), 3 * 8),
        (nn.Linear(8, 16).requires_grad_(False), 0),
        (nn.LayerNorm(8), 3 * 8 + 3 + 3),
        (nn.Dropout(0.5), 3 * 8),
        (nn.BatchNorm1d(8).eval(), 3 * 8),
    ],
    ids=["input alone", "nothing, the weight being frozen", "input, mean and rstd", "mask", "no buffers"],
)
def test_layers_by_hand(layer, values):
    x = torch.randn(3, 8, requires_grad=not any(p.requires_grad for p in layer.parameters()))
    with measure_saved(layer) as saved:
        y = layer(x)
    assert y.requires_grad
    assert saved.total == saved.peak == 4 * values
    assert saved.by_module == saved.by_module_now == ({type(layer).__name__: 4 * values} if values else {})


def times_a_slice() -> Tensor:
    return torch.randn(100)[:3] * torch.randn(3, requires_grad=True)


def products_of_views() -> Tensor:
    x = torch.randn(100, requires_grad=True)
    return x[:10] * x[:10].view(2, 5).reshape(10) + x.square()[:10]


def top_two() -> Tensor:
    return torch.randn(6, 4, requires_grad=True).exp().topk(2)[0]


def parameters_alone() -> Tensor:
    w, x = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
    return (x @ w.t()) * w[0]


def pair() -> Tensor:
    return TwoTensor(torch.randn(10), torch.randn(10)).requires_grad_().exp()


@pytest.mark.parametrize(
    ("function", "nbytes"),
    [
        (products_of_views, 400),  # one storage of 100 values, however often and in whatever pieces
        (times_a_slice, 400),  # a slice keeps the whole storage alive
        (top_two, 6 * 4 * 4 + 6 * 2 * 8),  # exp's output, and topk's int64 indices
        (parameters_alone, 2 * 3 * 8 * 4),  # x and x @ w.t(); w.t() and w[0] are the parameter's
        (pair, 80),  # one tensor of ten floats to the eye, two inside
    ],
)
def test_functions_by_hand(function, nbytes):
    with measure_saved() as saved:
        y = function()
    assert saved.total == nbytes
    del y


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(off):
    model = mlp().eval()
    with off():
        assert saved_after(mlp_step(model), model) == 0


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))


def frozen() -> nn.Module:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    return model


def autocast_step(model: nn.Module) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return llama_step(model)()

    return step


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (mlp, mlp_step),
        (lambda: mlp().eval(), mlp_step),
        (lambda: mlp().bfloat16().float(), mlp_step),
        (llama, llama_step),
        (lambda: llama(tie_word_embeddings=True), llama_step),
        (lambda: llama(attn_implementation="eager"), llama_step),
        (lambda: llama().bfloat16(), llama_step),
        (frozen, llama_step),
        (lora, llama_step),
        (llama, autocast_step),  # the weights' bf16 copies are kept, and they are not parameters
    ],
    ids=["mlp", "eval", "rounded", "llama", "tied", "eager", "bf16", "frozen", "lora", "autocast"],
)
def test_saved_is_what_is_alive(make, step):
    model = make()
    assert saved_after(step(model), model) == alive_after(step(model), model) > 0


# Halving every activation, but neither the int64 ids nor what the norms and the loss keep in fp32, leaves under 0.7.
@pytest.mark.parametrize(("make", "share"), [(frozen, 1), (lambda: llama().bfloat16(), 0.7)], ids=["frozen", "bf16"])
def test_some_models_keep_less(make, share):
    less, full = make(), llama()
    assert saved_after(llama_step(less), less) < share * saved_after(llama_step(full), full)


def test_adapters_have_their_names():
    model = lora()
    with measure_saved(model) as saved:
        loss = llama_step(model)()
    assert any(name.endswith("q_proj.lora_A.default") for name in saved.by_module)
    del loss


def test_llama_without_naming_the_model_differs_by_its_buffers_only():
    model = llama()
    named, unnamed = saved_after(llama_step(model), model), saved_after(llama_step(model), None)
    assert named <= unnamed <= named + sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_layers_inputs(reentrant):
    model = llama()
    plain = saved_after(llama_step(model), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with measure_saved(model) as saved:
        loss = llama_step(model)()
    one = BATCH * TOKENS * HIDDEN * 4
    # An older transformers enters the checkpoint before it enters the layer: then the inputs are the parent's.
    inputs = {name: n for name, n in saved.by_module.items() if name == "model" or name.startswith("model.layers.")}
    assert sum(inputs.values()) == LAYERS * one
    assert saved.total < plain / 2

    # The rest of what is alive is in closures: the rotary cos and sin, which every layer gets by keyword.
    rotary = 2 * TOKENS * (HIDDEN // HEADS) * 4
    assert alive_after(llama_step(model), model) - saved.total <= rotary + TOKENS * 8
    del loss


@pytest.mark.parametrize("early_stop", [True, False])
def test_recomputation_shows_in_the_peak_of_backward(early_stop):
    inner = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8), nn.Tanh())
    x = torch.randn(4, 8, requires_grad=True)
    with measure_saved(inner) as saved:
        y = checkpoint(inner, x, use_reentrant=False, early_stop=early_stop)
        assert isinstance(y, Tensor)
        assert saved.total == 4 * 8 * 4
        y.sum().backward()
    assert saved.total == 0
    # The checkpoint, the first tanh's output, which the second linear shares, and the second tanh's.
    assert saved.peak == (4 * 8 + 4 * 64 + 4 * 8) * 4


def test_a_step_of_forward_and_backward_peaks_at_what_forward_kept():
    model = llama()
    with measure_saved(model) as forward:
        loss = llama_step(model)()
    del loss
    with measure_saved(model) as both:
        llama_step(model)().backward()
    assert both.total == 0
    assert both.peak == forward.total
    assert both.by_module == forward.by_module


def test_fake_and_meta_tensors_count_what_real_ones_would():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = saved_after(mlp_step(model := mlp()), model)
    with FakeTensorMode():
        fake_model = mlp()
        fake = saved_after(lambda: fake_model(torch.empty(3, 8)).square().sum(), fake_model)
    with torch.device("meta"):
        meta_model = mlp()
        meta = saved_after(lambda: meta_model(torch.empty(3, 8)).square().sum(), meta_model)
    assert real == fake == meta > 0
    assert parameter_bytes(fake_model) == parameter_bytes(meta_model) == parameter_bytes(mlp())

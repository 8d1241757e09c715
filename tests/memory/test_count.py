"""Parameters, gradients and optimizer states against counts by hand."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_lowmem.memory import gradient_bytes, human_bytes, optimizer_bytes, parameter_bytes
from hf_lowmem.memory.count import total_bytes
from tests.memory.models import HIDDEN, VOCAB, llama, mlp, mlp_step


def test_parameters_tied_and_trainable():
    model = llama(tie_word_embeddings=True)
    unique = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert parameter_bytes(model) == sum(unique.values())
    assert parameter_bytes(llama()) == parameter_bytes(model) + VOCAB * HIDDEN * 4
    assert parameter_bytes(model, trainable=True) == parameter_bytes(model)
    model.model.layers.requires_grad_(False)
    kept = VOCAB * HIDDEN + HIDDEN  # the embedding, which is the head too, and the last norm
    assert parameter_bytes(model, trainable=True) == kept * 4
    assert parameter_bytes(list(model.parameters())) == parameter_bytes(model)
    assert parameter_bytes([nn.Parameter(torch.zeros(4, 4)[:1])]) == 64


def test_gradients():
    model = mlp()
    assert gradient_bytes(model) == 0
    mlp_step(model)().backward()
    assert gradient_bytes(model) == gradient_bytes(model.parameters()) == parameter_bytes(model)
    next(model.parameters()).grad = None
    assert gradient_bytes(model) == parameter_bytes(model) - 8 * 16 * 4
    bucket = torch.zeros(100)  # as DDP does
    views = [nn.Parameter(torch.zeros(10)) for _ in range(3)]
    for i, p in enumerate(views):
        p.grad = bucket[10 * i : 10 * i + 10]
    assert gradient_bytes(views) == 400


def stepped(make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    model = mlp()
    optimizer = make(model.parameters())
    assert optimizer_bytes(optimizer) == 0
    mlp_step(model)().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("make", "per_value", "per_tensor"),
    [
        (torch.optim.AdamW, 8, 4),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12, 4),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 0),
    ],
    ids=["adamw", "amsgrad", "sgd", "momentum"],
)
def test_states_of_torchs_optimizers(make, per_value, per_tensor):
    sizes = [p.numel() for p in mlp().parameters()]
    assert optimizer_bytes(stepped(make)) == per_value * sum(sizes) + per_tensor * len(sizes)


def test_accelerates_wrapper_is_its_optimizer():
    from accelerate import Accelerator

    plain = stepped(torch.optim.AdamW)
    wrapped = Accelerator(cpu=True).prepare(plain)
    assert wrapped is not plain
    assert optimizer_bytes(wrapped) == optimizer_bytes(plain) > 0


def test_bitsandbytes_counts_codes_scales_and_the_shared_code_book():
    import bitsandbytes as bnb

    # Trainer keeps embeddings in 32 bits by their parameters' addresses, in a table that outlives them.
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    model = nn.Linear(64, 128)  # 8192 values in blocks of 256; the bias, under 4096 values, stays fp32
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    maps = {t.data_ptr(): t.nbytes for s in optimizer.state.values() for k, t in s.items() if "qmap" in k}
    assert maps
    expected = 2 * (8192 + 8192 // 256 * 4) + 2 * 128 * 4 + sum(maps.values())
    assert optimizer_bytes(optimizer) == expected


def test_states_in_containers_objects_and_subclasses_count_once_and_parameters_not():
    p = nn.Parameter(torch.zeros(10))
    shared = torch.zeros(5)
    state = {
        "dict": {"codes": torch.zeros(10, dtype=torch.uint8), "list": [shared, (shared[:2],)]},
        "object": SimpleNamespace(matrix=torch.zeros(3), itself=None, name="x", rank=4),
        "pair": TwoTensor(torch.zeros(5), shared),
        "parameter": p,
        "view": p.detach()[2:],
        "seed": 1234,
    }
    state["object"].itself = state["object"]
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = state
    assert optimizer_bytes(optimizer) == 10 + 20 + 12 + 20


def test_sparse_and_jagged_tensors_count_their_parts():
    dense = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    assert total_bytes([dense.to_sparse()]) == 3 * 4 + 2 * 3 * 8
    ends, index, values = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0]), torch.tensor([1.0, 2.0, 3.0])
    expected = ends.nbytes + index.nbytes + values.nbytes
    assert total_bytes([torch.sparse_csr_tensor(ends, index, values, size=(2, 3))]) == expected
    assert total_bytes([torch.sparse_csc_tensor(ends, index, values, size=(3, 2))]) == expected
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    assert total_bytes([jagged]) == 6 * 3 * 4 + jagged.offsets().nbytes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (62.5 * 2**30, "62.50 GiB"),
        (-(2**20), "-1.00 MiB"),
        (3 * 2**50, "3072.00 TiB"),
    ],
)
def test_human_bytes(n, text):
    assert human_bytes(n) == text


@pytest.mark.train
def test_memory_needs_torch_alone():
    unwanted = {"transformers", "trl", "triton", "bitsandbytes", "psutil"}
    code = f"import sys, hf_lowmem.memory; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Packed rows and windows without a mask: the kernel for several lengths, by a stand-in of its signature."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from hf_lowmem.activations.streaming import attention, documents
from hf_lowmem.activations.streaming.documents import Documents, found_in
from hf_lowmem.activations.streaming.masks import Lazy
from tests.activations.models import loss_and_gradients
from tests.activations.streams import TOKENS, distance, laid_out, model_of, streamed


class Standin:
    """`varlen_attn` in plain torch, as FlashAttention 2 has it: of unequal lengths the last query sees the last key."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        **more: object,
    ) -> Tensor:
        assert all(t.ndim == 3 and t.stride(-1) == 1 and t.shape[-1] % 8 == 0 for t in (query, key, value))
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (cu_seq_q, cu_seq_k))
        assert query.shape[1] % key.shape[1] == 0
        assert more.keys() <= {"enable_gqa"}
        q_ends, k_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
        assert (q_ends[0], k_ends[0], q_ends[-1], k_ends[-1]) == (0, 0, len(query), len(key))
        left, right = window_size
        assert right == 0
        assert scale is not None
        self.calls.append((len(q_ends) - 1, len(query), len(key)))
        outs, longest = [], [0, 0]
        for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
            longest = [max(longest[0], b - a), max(longest[1], d - c)]
            repeat = query.shape[1] // key.shape[1]
            k, v = (t[c:d].repeat_interleave(repeat, 1) for t in (key, value))
            at = torch.arange(d - c - (b - a), d - c)[:, None]
            there = torch.arange(d - c)
            seen = (there <= at) & ((there >= at - left) if left >= 0 else True)
            scores = torch.einsum("qhd,khd->hqk", query[a:b], k) * scale
            outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
        assert [max_q, max_k] == longest
        return torch.cat(outs)


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The other kernel: causal from the lower right, one length."""
    corner = attention.Corner(key.shape[2], query.shape[2])
    return attention._masked(query, key, value, 0.0, scale, corner)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Standin:
    """A CPU that stands for a CUDA device, whose kernels take float64."""
    made = Standin()
    monkeypatch.setattr(documents, "varlen_attn", made)
    monkeypatch.setattr(attention, "on_accelerator", lambda tensor: True)
    monkeypatch.setattr(attention, "halves", lambda dtype: dtype == torch.float64)
    monkeypatch.setattr(attention, "_flash", flash)
    return made


def test_the_standin_has_the_signature_of_the_kernel() -> None:
    theirs = inspect.signature(varlen.varlen_attn).parameters
    ours = inspect.signature(Standin().__call__).parameters
    named = [name for name in ours if name != "more"]
    assert [n for n in theirs if n in named] == named
    assert all(theirs[name].kind == ours[name].kind for name in named)
    assert documents.GROUPED.keys() <= theirs.keys()


@pytest.mark.parametrize(
    ("family", "layout", "chunk", "changes"),
    [
        ("llama", "packed", 7, {}),
        ("llama", "packed", 8, {"head_dim": 12}),  # which the kernel's is filled up from
        ("mistral", "plain", 7, {}),
        ("mistral", "packed", 1, {}),
        ("gemma3", "packed", 8, {}),
        ("smollm3", "packed", 8, {}),
        ("gpt_neox", "packed", 8, {}),
    ],
)
def test_gradients_are_huggingfaces_and_no_mask_is_made(
    family: str, layout: str, chunk: int, changes: dict[str, Any], standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of(family, **changes), laid_out(layout)
    loss, grads = loss_and_gradients(model, inputs)
    made, table = [], Lazy._table
    monkeypatch.setattr(Lazy, "_table", lambda self, *at: (made.append(at), table(self, *at))[1])
    ours, found = loss_and_gradients(streamed(model, chunk), inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-12 if family != "gemma3" else 1e-6, atol=0)
    assert distance(found, grads) <= (1e-12 if family != "gemma3" else 1e-6)
    # The first chunk's, whose keys are its queries, and those of a layer's trial.
    assert all((start, first) == (0, 0) and end <= 16 and last <= 16 for start, end, first, last in made)
    assert standin.calls
    if layout == "packed":
        assert max(keys for _, _, keys in standin.calls) < 13 + chunk  # a document's at most, and a chunk's


def test_rows_of_different_documents(standin: Standin) -> None:
    model, inputs = model_of("mistral"), laid_out("packed")
    inputs["position_ids"] = torch.stack([inputs["position_ids"][0], torch.arange(TOKENS)])
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 8), inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    assert distance(found, grads) <= 1e-12
    assert {n for n, _, _ in standin.calls} == {1, 2}


@pytest.mark.parametrize("case", ["fp32", "padding", "dropout"])
def test_where_the_kernel_cannot_a_mask_is_made(case: str, standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("mistral"), laid_out("right" if case == "padding" else "packed")
    if case == "fp32":
        monkeypatch.setattr(attention, "halves", lambda dtype: dtype in (torch.bfloat16, torch.float16))
    if case == "dropout":  # what is seen at the call alone
        monkeypatch.setattr(attention, "flash_takes", lambda *args: False)
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 8), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-12
    assert not standin.calls


def test_a_layer_that_changes_its_mask_gets_one(standin: Standin) -> None:
    model, inputs = model_of("llama"), laid_out("packed")
    loss, grads = loss_and_gradients(model, inputs)
    ours = streamed(model, 8)

    def changing(inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, attention_mask, **kwargs: inner(*args, attention_mask=attention_mask.clone(), **kwargs)

    for layer in ours.model.layers:
        layer.self_attn.forward = changing(layer.self_attn.forward)
    found, of_weights = loss_and_gradients(ours, inputs)
    assert torch.equal(found, loss)
    assert distance(of_weights, grads) <= 1e-12
    assert not standin.calls


def meaning(sees: Any, rows: int = 2, tokens: int = 24) -> Documents | None:
    return found_in(sees, rows, tokens, torch.device("cpu"))


def test_what_a_mask_means_is_found_or_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 2 * 24 * 5)
    of = torch.tensor([[0] * 9 + [1] * 15, [0] * 3 + [1] * 3 + [2] * 18])

    def packed(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (of[b, q] == of[b, k])

    for sees, begins, window in (
        (lambda b, q, k: k <= q, [[0], [0]], None),
        (packed, [[0, 9], [0, 3, 6]], None),
        (lambda b, q, k: packed(b, q, k) & (k > q - 5), [[0, 9], [0, 3, 6]], 5),
        (lambda b, q, k: packed(b, q, k) & (k > q - 18), [[0, 9], [0, 3, 6]], None),
        (lambda b, q, k: (k <= q) & (q // 8 == k // 8), [[0, 8, 16]] * 2, None),
    ):
        found = meaning(sees)
        assert found is not None
        assert (found.begins, found.window) == (begins, window)
    for sees in (
        lambda b, q, k: k <= q + 1,
        lambda b, q, k: (k <= q) & ((k > q - 5) | (k < 2)),  # as sinks are
        lambda b, q, k: (k <= q) & ((b == 0) | (k > q - 5)),
        lambda b, q, k: (k <= q) & ~((q == 23) & (k == 11)),
        lambda b, q, k: (k <= q) & (k != 7),
        lambda b, q, k: (k <= q) | ((q < 3) & (k < 3)),  # a prefix
    ):
        assert meaning(sees) is None
    assert meaning(lambda b, q, k: k <= q, 1, 1) is not None


def test_pieces_of_a_chunk() -> None:
    made = Documents([[0, 9, 20], [0]], 6, torch.device("cpu"))
    one, two = made.pieces(8, 16)
    assert (one.first, one.of_queries.tolist(), one.of_keys.tolist()) == (3, [0, 1, 8], [0, 6, 13])
    assert (one.queries, one.keys) == (7, 7)
    assert (two.first, two.of_queries.tolist(), two.of_keys.tolist()) == (3, [0, 8], [0, 13])
    assert made.pieces(9, 16)[0].first == 9
    assert made.pieces(8, 16)[0] is one

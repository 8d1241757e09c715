"""Shared prompts in streamed layers: two calls merged by their log-sum-exp are the dense mask's attention."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from hf_lowmem.activations import convert
from hf_lowmem.activations.streaming import attention, shared
from hf_lowmem.activations.streaming.masks import Lazy
from hf_lowmem.activations.streaming.shared import Part, Run, Shared
from hf_lowmem.preference.sharing import share_prompts
from hf_lowmem.preference.sharing.layout import SEGMENTS, SOURCE
from hf_lowmem.preference.sharing.share import Visible
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import EXPERTS, FAMILIES, loss_and_gradients
from tests.activations.streams import bound_of, distance, model_of, streamed
from tests.preference.sharing.families import batch, examples


def pairs_of(budget: int | None, **collator: Any) -> dict[str, Any]:
    made = batch(budget, **collator)
    made["input_ids"] %= 96
    labels = made["input_ids"].masked_fill(made.pop("completion_mask") == 0, -100)
    return made | {"labels": labels, "use_cache": False}


def sharing(family: str, **changes: Any) -> Any:
    model = model_of(family, **changes)
    share_prompts(model)
    return model


def is_the_dense_masks(family: str, budget: int | None, chunks: tuple[int, ...]) -> None:
    model, inputs = sharing(family), pairs_of(budget)
    loss, grads = loss_and_gradients(model, inputs)
    bound = bound_of(family, model, inputs, grads)
    for chunk in chunks:
        ours, found = loss_and_gradients(streamed(model, chunk), inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-6 if family in EXPERTS else 1e-7, atol=0)  # which fp32 has
        assert distance(found, grads) <= bound, chunk


QUICK = [("llama", None), ("llama", 33), ("mistral", 33), ("gemma3", None), ("gpt2", 33)]


@pytest.mark.parametrize(("family", "budget"), QUICK)
def test_gradients_are_the_dense_masks(family: str, budget: int | None) -> None:
    is_the_dense_masks(family, budget, (5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 33])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_those_of_every_family_are(family: str, budget: int | None) -> None:
    is_the_dense_masks(family, budget, (1, 7, 8, 64))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the masks that are made."""
    made: list[tuple[int, int]] = []
    table = Lazy._table

    def noted(self: Lazy, start: int, end: int, first: int, last: int) -> Tensor:
        made.append((end - start, last - first))
        return table(self, start, end, first, last)

    monkeypatch.setattr(Lazy, "_table", noted)
    return made


@pytest.mark.parametrize("chunk", [7, 64])
def test_no_mask_is_made_and_blocks_of_queries_change_nothing(
    chunk: int, tables: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "ROWS", 3)
    model, inputs = sharing("mistral"), pairs_of(33)
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, chunk, "stream_fp8:0,stream:1"), inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-7, atol=0)
    deeper = {n: g for n, g in found.items() if ".layers.1." in n}
    assert deeper
    assert distance(deeper, {n: grads[n] for n in deeper}) <= 1e-12
    assert set(tables) == {(16, 16)}  # of a layer's trial, on its first tokens


def test_dropout_and_eager_attention_take_a_mask_of_a_chunk(tables: list[tuple[int, int]]) -> None:
    for family, changes in (("llama", {"attention_dropout": 0.5}), ("gemma2", {})):
        tables.clear()
        loss_and_gradients(streamed(sharing(family, **changes), 8), pairs_of(None))
        assert {queries for queries, _ in tables} >= {8}


def seen_by(shared: Shared, part: Part) -> Tensor:
    """A part's mask, without the view."""
    mask = shared.mask(part, torch.zeros(1))
    shape = part.end - part.start, part.last - part.first
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.flip(0) == 0


def seen_in_kernel(shared: Shared, part: Part) -> Tensor:
    """A part's mask as `varlen_attn` documents its window."""
    left, right = shared.limits(part)
    assert left >= -1
    queries, keys = part.end - part.start, part.last - part.first
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    return ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))


@pytest.mark.parametrize("window", [None, 1, 2, 6, 9, 60])
@pytest.mark.parametrize("seen", [seen_by, seen_in_kernel])
def test_parts_are_the_mask(window: int | None, seen: Callable[[Shared, Part], Tensor]) -> None:
    for budget, chunk, most in product((None, 40, 64), (7, 64), (2, 64)):
        made = batch(budget, examples([(20, 3, 12), (2, 14, 14)]))
        segments, width = made[SEGMENTS], made["input_ids"].shape[1]
        rows, length = segments.shape
        visible = Visible(segments, made[SOURCE] % width, window, width)
        row, token = torch.arange(rows)[:, None, None], torch.arange(length)
        expected = visible(row, torch.tensor(0), token[:, None], token)
        meant = Shared([[Run(*run) for run in runs] for runs in visible.runs()], window)
        spans = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
        found = torch.zeros_like(expected)
        for (start, end), first in zip(spans, meant.starts(spans), strict=True):
            firsts = set()
            for part in meant.parts(start, end, most):
                block = found[part.row, part.start : part.end, part.first : part.last]
                assert not block.any()  # nobody sees a key twice
                block |= seen(meant, part)
                assert part.end - part.start <= most
                assert found[part.row, part.start : part.end].any(-1).all()  # and everybody sees one, from the first on
                firsts.add(part.first)
            assert first == min(firsts)
        real = segments != 0
        assert torch.equal(found[real], expected[real])
        assert found.any(-1).all()


def test_runs_of_a_plan_are_those_of_its_batch() -> None:
    """A prompt of one token, and answers as long as rows of the plain batch."""
    for budget, multiple in ((None, None), (60, None), (60, 8)):
        made = batch(budget, pairs_of_length(3), pad_to_multiple_of=multiple)
        segments, width = made[SEGMENTS], made["input_ids"].shape[1]
        visible = Visible(segments, made[SOURCE] % width, None, width)
        real, planned = visible.runs(), visible.longest_runs()
        assert len(real) == len(planned)
        if multiple is None:
            assert real[0] == planned[0]
        assert all(runs[-1][1] == segments.shape[1] for runs in planned)


def pairs_of_length(count: int, tokens: int = 12) -> list[dict[str, Any]]:
    answers = {"chosen_ids": [5] * (tokens - 1), "rejected_ids": [6] * (tokens - 1)}
    return [{"prompt_ids": [4]} | answers for _ in range(count)]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("first", [False, True])
def test_keys_of_the_other_answer_and_outside_of_the_window_are_never_read(window: int | None, first: bool) -> None:
    """They are NaN, and so would be whatever has read them, also behind a mask."""
    prompt, chosen, rejected = (0, 20), (20, 33), (33, 40)
    meant = Shared([[Run(0, 33, 0, 0), Run(*rejected, *prompt)]], window)
    start, end = (30, 33) if first else (36, 40)
    outside = [rejected if first else chosen]
    if window is not None:
        outside.append((0, start - window + 1) if first else (0, 20 - (window - 1 - 3)))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, n, 40, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    outs = []
    for poison in (0.0, float("nan")):
        q, k, v = (t.clone() for t in whole)
        for t in (k, v):
            for a, b in outside:
                t[:, :, a:b] = poison
        q, k, v = (t.clone().requires_grad_() for t in (q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
        out = shared.attend_shared(q, k, v, None, meant, start, 0, flash=False)
        out.square().sum().backward()
        outs.append([out, q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*outs, strict=True))


class Standin:
    """`varlen_attn` and its backward in plain torch, of one sequence, as FlashAttention 2 has them: gradients from the
    output and the log-sum-exp that they are given."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []

    @staticmethod
    def scores(q: Tensor, k: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
        assert q.ndim == k.ndim == 3
        assert q.stride(-1) == k.stride(-1) == 1
        assert q.shape[-1] % 8 == 0
        queries, keys = len(q), len(k)
        place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        left, right = window
        seen = ((left < 0) | (key >= place - left)) & ((right < 0) | (key <= place + right))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, float("-inf"))

    @staticmethod
    def check(q: Tensor, k: Tensor, lengths: tuple[Any, ...]) -> None:
        of_queries, of_keys, queries, keys = lengths
        assert (of_queries.tolist(), of_keys.tolist()) == ([0, len(q)], [0, len(k)])
        assert of_queries.dtype == of_keys.dtype == torch.int32
        assert (queries, keys) == (len(q), len(k))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **named: Any) -> tuple[Tensor, Tensor]:
        assert named.keys() <= {"scale", "window_size", "return_aux", "enable_gqa"}
        assert named["return_aux"].lse
        self.check(q, k, lengths)
        self.windows.append(named["window_size"])
        scores = self.scores(q, k, named["scale"], named["window_size"])
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        *lengths, causal, rng, scale, window = rest
        self.check(q, k, tuple(lengths))
        assert lse.is_contiguous()
        assert causal == (window == [-1, 0])
        assert rng.dtype == torch.uint64
        group = q.shape[1] // k.shape[1]
        weights = (self.scores(q, k, scale, tuple(window)) - lse[..., None]).exp()
        of_weights = torch.einsum("qhd,khd->hqk", grad, v.repeat_interleave(group, 1))
        of_scores = weights * (of_weights - (grad * out).sum(-1).T[..., None]) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", of_scores, q), torch.einsum("hqk,qhd->khd", weights, grad)
        dq = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(group, 1))
        return dq, *(t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Standin:
    """A CPU that stands for a CUDA device, whose kernels take float64."""
    made = Standin()
    monkeypatch.setattr(shared, "varlen_attn", made)
    monkeypatch.setattr(shared, "varlen_backward", made.backward)
    monkeypatch.setattr(attention, "on_accelerator", lambda tensor: True)
    monkeypatch.setattr(attention, "halves", lambda dtype: dtype == torch.float64)
    return made


def test_the_backward_that_is_called_has_that_signature() -> None:
    schema = shared.varlen_backward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == [
        "grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal",
        "rng_state", "scale", "window_size",
    ]  # fmt: skip
    assert varlen.AuxRequest(lse=True).lse


@pytest.mark.parametrize(
    ("family", "chunk", "changes"),
    [("llama", 7, {}), ("llama", 64, {"head_dim": 12}), ("mistral", 8, {"sliding_window": 6}), ("gpt2", 5, {})],
)
def test_on_a_cuda_device_it_is_the_kernel_for_several_lengths(
    family: str, chunk: int, changes: dict[str, Any], standin: Standin, tables: list[tuple[int, int]]
) -> None:
    model, inputs = sharing(family, **changes), pairs_of(33)
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, chunk), inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-7, atol=0)
    assert distance(found, grads) <= 1e-12
    assert set(tables) == {(16, 16)}
    windows = set(standin.windows)
    assert ((-1, 0) in windows) == (family != "mistral")
    assert any(right == -1 for _, right in windows)


def test_another_shape_of_log_sum_exps_is_refused(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        out, lse = standin(*args, **named)
        return out, lse.T

    monkeypatch.setattr(shared, "varlen_attn", turned)
    with pytest.raises(RuntimeError, match=r"log-sum-exps of shape .* cannot merge two calls. Leave"):
        loss_and_gradients(streamed(sharing("llama"), 7), pairs_of(33))


def test_a_layer_that_asks_once_and_never_again_is_an_error() -> None:
    """It would see what its mask hides."""
    model = sharing("llama")
    ours = streamed(model, 8)
    for layer in ours.model.layers:
        layer.self_attn.forward = _asks_for(3, layer.self_attn.forward)
    with pytest.raises(RuntimeError, match=r"has not asked transformers' table for its attention as it did before"):
        loss_and_gradients(ours, pairs_of(None))


def _asks_for(times: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def forward(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > times:  # one of its own, of what it was given
            tokens = kwargs["hidden_states"].shape[1]
            attention_mask = torch.zeros(1, 1, tokens, 1, dtype=torch.float64)
        return inner(*args, attention_mask=attention_mask, **kwargs)

    return forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_roundings_are_no_worse_than_one_mask(dtype: torch.dtype) -> None:
    """Against float64: as near as the dense mask's."""
    model, inputs = sharing("llama"), pairs_of(33)
    _, truth = loss_and_gradients(model, inputs)
    model.to(dtype)

    def error(grads: dict[str, Tensor]) -> float:
        off = sum(float((grads[n].double() - g).square().sum()) for n, g in truth.items())
        return (off / sum(float(g.square().sum()) for g in truth.values())) ** 0.5

    theirs = error(loss_and_gradients(model, inputs)[1])
    assert error(loss_and_gradients(streamed(model, 8), inputs)[1]) <= 1.1 * theirs


def test_a_model_that_is_streamed_first_and_shares_then() -> None:
    """Its masks are dense, and its numbers the same."""
    plain, inputs = sharing("llama"), pairs_of(None)
    loss, grads = loss_and_gradients(plain, inputs)
    model = model_of("llama")
    convert(model, ActivationSpec(tiers="stream", chunk=8))
    share_prompts(model)
    ours, found = loss_and_gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-7, atol=0)
    assert distance(found, grads) <= 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_without_a_gradient_is_the_training_s_and_makes_no_mask(
    training: bool, tables: list[tuple[int, int]]
) -> None:
    """A reference's pass: to the bit what the policy computes, so that DPO begins at log 2."""
    model, inputs = streamed(sharing("mistral"), 8), pairs_of(33)
    loss, _ = loss_and_gradients(model, inputs)
    tables.clear()
    model.train(training)
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, loss)
    assert not tables
    plain = model_of("mistral")
    alone = {name: value[:2] for name, value in inputs.items() if name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert torch.equal(model(**alone, use_cache=False).loss, plain(**alone, use_cache=False).loss)

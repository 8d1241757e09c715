"""Tiers `stream` and `stream_fp8`: HuggingFace's loss to the last bit, its gradients, in chunks of any length."""

from itertools import product
from typing import Any

import pytest
import torch

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.convert import convert as convert_model
from hf_lowmem.activations.streaming.attention import Corner, lower_right
from tests.activations.models import EXPERTS, FAMILIES, batch, build, loss_and_gradients, twin
from tests.activations.streams import CHUNKS, LAYOUTS, TOKENS, bound_of, distance, laid_out, model_of, streamed

# Eager attention makes NaN of a row without keys, with HuggingFace alone.
CASES = [(f, layout) for f, layout in product([*FAMILIES, *EXPERTS], LAYOUTS) if (f, layout) != ("gemma2", "left")]
QUICK = [
    *product(["llama"], LAYOUTS),
    ("mistral", "packed"),
    ("gemma3", "right"),
    ("gemma2", "packed"),
    ("gpt2", "plain"),
    ("mixtral", "plain"),
]


# Families whose layers have a window where their configuration says so: those whose own is None, or off.
OFTEN = {"use_sliding_window": True, "sliding_window": 8}
WINDOWED: dict[str, dict[str, Any]] = {
    "qwen2": OFTEN | {"max_window_layers": 1},
    "qwen3": OFTEN | {"max_window_layers": 1},
    "smollm3": OFTEN | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "qwen3_moe": OFTEN,
}


def is_huggingfaces(family: str, layout: str, **changes: Any) -> None:
    model, inputs = model_of(family, **changes), laid_out(layout)
    loss, grads = loss_and_gradients(model, inputs)
    bound = bound_of(family, model, inputs, grads)
    for chunk in CHUNKS:
        ours, found = loss_and_gradients(streamed(model, chunk), inputs)
        if family in EXPERTS:
            # A product of an expert's tokens has other numbers of them in a chunk, so other sums in float32.
            torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
        else:
            assert torch.equal(ours, loss), (chunk, float(ours - loss))
        assert distance(found, grads) <= (0 if chunk == TOKENS else bound), chunk


@pytest.mark.train
@pytest.mark.parametrize(("family", "layout"), QUICK)
def test_loss_and_gradients_are_huggingfaces(family: str, layout: str) -> None:
    is_huggingfaces(family, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [case for case in CASES if case not in QUICK])
def test_those_of_every_other_family_are(family: str, layout: str) -> None:
    is_huggingfaces(family, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", WINDOWED)
def test_those_of_families_with_a_window_of_choice_are(family: str, layout: str) -> None:
    wide, narrow = (laid_out_loss(family, layout, changes) for changes in ({}, WINDOWED[family]))
    assert wide != narrow  # the window is there
    is_huggingfaces(family, layout, **WINDOWED[family])


def laid_out_loss(family: str, layout: str, changes: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(model_of(family, **changes)(**laid_out(layout)).loss)


def is_checkpoint_fp8(family: str, layout: str, chunk: int) -> None:
    """The same loss to the last bit, and its gradients: to 1e-6 where a model computes in float32 inside."""
    model, inputs = model_of(family), laid_out(layout)
    loss, grads = loss_and_gradients(twin(model, lambda m: convert(m, "checkpoint_fp8")), inputs)
    ours, found = loss_and_gradients(streamed(model, chunk, "stream_fp8"), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= (1e-12 if family in ("llama", "mistral") else 1e-6)


@pytest.mark.parametrize(
    ("family", "layout", "chunk"),
    [
        ("llama", "plain", 8),
        ("llama", "left", 7),
        ("llama", "packed", 8),
        ("llama", "plain", TOKENS),
        ("mistral", "right", 7),
        ("gemma3", "packed", 8),
    ],
)
def test_stream_fp8_is_checkpoint_fp8(family: str, layout: str, chunk: int) -> None:
    is_checkpoint_fp8(family, layout, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_fp8_is_checkpoint_fp8_in_every_family(family: str, layout: str) -> None:
    is_checkpoint_fp8(family, layout, 7)


def test_tiers_go_together_layer_by_layer() -> None:
    """A layer that is not streamed makes and reads whole masks."""
    model = model_of("mistral", num_hidden_layers=3)
    inputs = laid_out("packed")
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 7, "stream:0,exact:1"), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_over_chunks_lose_nothing(dtype: torch.dtype) -> None:
    """Against float64: as near as HuggingFace's one sum, as chunks are added up in fp32."""
    model, inputs = build("llama", dtype), batch(48)
    _, truth = loss_and_gradients(twin(model, lambda m: m.double()), inputs)

    def error(grads: dict[str, Any]) -> float:
        off = sum(float((grads[n].double() - g).square().sum()) for n, g in truth.items())
        return (off / sum(float(g.square().sum()) for g in truth.values())) ** 0.5

    theirs = error(loss_and_gradients(model, inputs)[1])
    assert error(loss_and_gradients(streamed(model, 4), inputs)[1]) <= 1.1 * theirs


def test_blocks_of_queries_under_one_mask_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lowmem.activations.streaming.attention.ROWS", 3)
    is_huggingfaces("llama", "plain")


def test_long_sequences_have_the_bits_of_whole_layers_in_fp32() -> None:
    """Where chunks, and blocks of queries in them, are whole ones of the kernel that sums over keys."""
    model = build("llama", num_hidden_layers=1, max_position_embeddings=2700)
    inputs = batch(2600, 1)
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 1536), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-4


def test_a_mask_is_a_view_of_a_line() -> None:
    corner = Corner(2000, 700)
    for queries, keys in ((700, 2000), (700, 701), (3, 2000), (1, 1)):
        mask = corner.of(queries, keys, torch.float64, torch.device("cpu")).flip(0)
        assert torch.equal(mask == 0, lower_right(queries, keys, mask.device))
        assert torch.equal(mask.isneginf(), ~lower_right(queries, keys, mask.device))
    assert corner.of(1, 1, torch.float64, torch.device("cpu")).untyped_storage().nbytes() == 8 * (2000 + 700 - 1)


def test_under_autocast() -> None:
    model, inputs = build("llama"), laid_out("right")

    def step(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters()}

    ours, theirs = streamed(model, 8), twin(model, lambda m: None)
    (found, grads), (loss, expected) = step(ours), step(theirs)
    # Of few keys torch's bf16 attention on a CPU makes other blocks than of many.
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0)
    assert all(g is not None and g.dtype == torch.float32 for g in grads.values())
    assert distance(grads, expected) <= 0.02  # of bf16 sums, in another order


def test_dropout_is_the_same_in_both_passes() -> None:
    """Gradients are those of the very function that was computed: numerically, along a random direction."""
    model = streamed(build("gpt2", torch.float64, resid_pdrop=0.3, attn_pdrop=0.3), 8)
    inputs, generator = {"input_ids": batch(TOKENS)["input_ids"]}, torch.Generator().manual_seed(5)
    weights = [p for n, p in model.named_parameters() if ".h.0." in n and n.endswith("weight")]
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in weights]
    onto = torch.randn(2, TOKENS, 96, generator=generator, dtype=torch.float64)

    def value(step: float) -> Any:
        with torch.no_grad():
            torch._foreach_add_(weights, along, alpha=step)
        torch.manual_seed(3)
        return (model(**inputs).logits * onto).sum()

    step = 1e-5
    slope = value(step).item() - value(-2 * step).item()
    grads = torch.autograd.grad(value(step), weights)
    inside = sum(float((g * d).sum()) for g, d in zip(grads, along, strict=True))
    assert slope / (2 * step) == pytest.approx(inside, rel=1e-6)


def test_a_model_without_dropout_leaves_the_generators_alone() -> None:
    model = streamed(build("llama"), 8)
    torch.manual_seed(7)
    model(**batch(TOKENS)).loss.backward()
    after = torch.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(after, torch.get_rng_state())


def test_undone_it_is_the_model_that_it_was() -> None:
    model, inputs = build("llama"), laid_out("right")
    before = loss_and_gradients(model, inputs)
    convert_model(model, "stream")
    undo(model)
    assert not any("forward" in vars(module) for module in model.modules())
    after = loss_and_gradients(model, inputs)
    assert torch.equal(before[0], after[0])
    assert distance(after[1], before[1]) == 0


def test_evaluation_and_generation_are_untouched() -> None:
    model = build("mistral").eval()
    ids = batch(12)["input_ids"]
    ours = streamed(model, 4)
    assert torch.equal(ours(input_ids=ids).logits, model(input_ids=ids).logits)
    made = [m.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (ours, model)]
    assert torch.equal(*made)

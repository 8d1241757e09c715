"""What a streamed layer reads, keeps and hands out; what is refused, or checkpointed instead, in words."""

import copy
import gc
import re
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from hf_lowmem.activations import convert, measure
from hf_lowmem.activations.aside import say_once
from hf_lowmem.activations.detect import find_stack
from hf_lowmem.activations.streaming import keys
from hf_lowmem.activations.streaming.able import why_not_streamed
from hf_lowmem.activations.streaming.tier import chunk_of
from hf_lowmem.specs import STREAMED, ActivationSpec
from tests.activations.models import batch, build, loss_and_gradients
from tests.activations.streams import TOKENS, distance, laid_out, model_of, streamed


class Largest(TorchDispatchMode):
    """The most values, and the most tokens x tokens, of a tensor that an operator makes; and the most bytes alive."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.square, self.peak, self.now = tokens, 0, 0, 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            if t.ndim > 1 and min(t.shape[-2:]) >= self.tokens:
                self.square = max(self.square, t.numel())
            if storage.data_ptr() and storage.data_ptr() not in self.alive:
                self.alive[storage.data_ptr()] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr())
        return out

    def _gone(self, place: int) -> None:
        self.now -= self.alive.pop(place, 0)


@pytest.mark.parametrize("layout", ["plain", "right", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_no_mask_of_tokens_times_tokens_is_made(family: str, layout: str) -> None:
    model = streamed(build(family), 8)
    inputs = laid_out(layout)
    loss_and_gradients(model, inputs)  # the trial's and the optimizer's first
    with Largest(TOKENS) as seen:
        model(**inputs).loss.backward()
    # Weights of the model are no larger than 112, and the head makes tokens x vocabulary.
    assert seen.square <= 2 * max(TOKENS * 112, 112 * 96)


@pytest.mark.parametrize(("family", "layout"), [("mistral", "plain"), ("gemma3", "plain"), ("llama", "packed")])
def test_keys_outside_of_window_and_document_are_never_read(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are NaN when a chunk asks for what it sees."""
    model, inputs = model_of(family), laid_out(layout)
    loss, grads = loss_and_gradients(model, inputs)
    poisoned = {"n": 0}
    views = keys.Keys.views

    def only_what_is_seen(self: Any) -> Any:
        kept = self.kept
        if self.first:
            poisoned["n"] += 1
            self.kept = [t.clone() for t in kept]
            for t in self.kept:
                t[:, :, : self.first] = float("nan")
        seen, self.kept = views(self), kept
        return seen

    ours = streamed(model, 4)
    monkeypatch.setattr(keys.Keys, "views", only_what_is_seen)
    found, of_weights = loss_and_gradients(ours, inputs)
    assert torch.equal(found, loss)
    assert distance(of_weights, grads) <= (1e-12 if family != "gemma3" else 1e-6)
    assert poisoned["n"] >= 2 * 2 * 3  # layers, passes, and the chunks that begin behind a window or a document


@pytest.mark.train
def test_memory_does_not_grow_with_the_number_of_chunks() -> None:
    model = build("llama", hidden_size=32, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    inputs = batch(512, 1)

    def peak(chunk: int) -> int:
        ours = streamed(model, chunk)
        loss_and_gradients(ours, inputs)
        gc.collect()
        with Largest(10**9) as seen:
            ours(**inputs).loss.backward()
        return seen.peak

    whole, half, eighth, many = peak(512), peak(256), peak(64), peak(8)
    assert half < 0.75 * whole
    assert many <= eighth < half


@pytest.mark.train
def test_fifty_steps_leak_nothing() -> None:
    model = streamed(build("llama"), 8, "stream_fp8")
    inputs = laid_out("right")

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(item, Tensor) for item in gc.get_objects())

    loss_and_gradients(model, inputs)
    before = tensors()
    for _ in range(50):
        model.zero_grad(set_to_none=False)
        model(**inputs).loss.backward()
    assert tensors() <= before


@pytest.mark.parametrize("tier", STREAMED)
def test_a_layer_keeps_its_input_alone(tier: str) -> None:
    model = streamed(build("llama", torch.bfloat16, hidden_size=128, num_hidden_layers=3), 16, tier)
    inputs = batch(48)
    measured = measure(model, lambda: model(**inputs).loss, 96)
    after = [kept for _, kept in measured.layers.values()]
    assert after[1:] == [96 * 128 * 2 if tier == "stream" else 96 * (128 + 2)] * 2


def test_every_weight_gets_its_gradient_once() -> None:
    model = streamed(build("llama"), 4)
    seen: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone()))
    _, grads = loss_and_gradients(model, batch(TOKENS))
    assert seen.keys() == grads.keys()
    assert all(len(found) == 1 and torch.equal(found[0], grads[name]) for name, found in seen.items())


def test_frozen_weights_and_embeddings() -> None:
    model = model_of("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "up_proj" not in name)
    model.model.layers[0].requires_grad_(False)
    inputs = laid_out("left")
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 8), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-12


def test_adapters_and_their_dropouts() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(dropout: float) -> Any:
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model_of("llama"), config, autocast_adapter_dtype=False).double().train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        return model

    model, inputs = adapted(0.0), laid_out("packed")
    loss, grads = loss_and_gradients(model, inputs)
    ours, found = loss_and_gradients(streamed(model, 8), inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-12
    one = streamed(adapted(0.3), TOKENS)  # one chunk: HuggingFace's own draws
    assert distance(loss_and_gradients(one, inputs)[1], loss_and_gradients(adapted(0.3), inputs)[1]) == 0
    several = streamed(adapted(0.3), 8)
    assert distance(loss_and_gradients(several, inputs)[1], loss_and_gradients(several, inputs)[1]) == 0


def test_inside_a_checkpoint_of_ones_own_it_steps_aside() -> None:
    model = model_of("mistral")
    inputs = laid_out("right")
    loss, grads = loss_and_gradients(model, inputs)
    ours = streamed(model, 8)
    layer = ours.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="inside a torch.utils.checkpoint"):
        found, of_weights = loss_and_gradients(ours, inputs)
    assert torch.equal(found, loss)
    assert distance(of_weights, grads) <= 1e-12


def test_transformers_tables_are_its_own_afterwards_and_in_other_threads() -> None:
    makers: Any = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(makers._local_mapping)
    model, other, results = streamed(build("mistral"), 8), build("mistral"), []
    want = loss_and_gradients(other, laid_out("packed"))[0]
    thread = threading.Thread(target=lambda: results.append(other(**laid_out("packed")).loss.detach()))
    inner = model.model.layers[1].mlp.forward

    def meanwhile(*args: Any) -> Any:
        if not results:
            thread.start()
            thread.join()
        return inner(*args)

    model.model.layers[1].mlp.forward = meanwhile
    loss_and_gradients(model, laid_out("packed"))
    assert torch.equal(results[0], want)
    assert dict(makers._local_mapping) == before


def test_a_mask_function_of_ones_own_is_looked_at_query_by_query() -> None:
    """One whose later queries see earlier keys again, and one that looks ahead inside of a chunk and behind it."""
    makers: Any = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    seen = {"back": lambda q, k: (k <= q) & ((k > q - 4) | ((q % 8 == 7) & (k < 3))), "ahead": lambda q, k: k <= q + 1}
    model, inputs = model_of("llama"), laid_out("plain")

    def with_own(model: Any, which: str) -> Any:
        inner = model.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = makers["sdpa"](
                batch_size=2, q_length=TOKENS, kv_length=TOKENS, allow_is_causal_skip=False,
                mask_function=lambda b, h, q, k: seen[which](q, k),
            )  # fmt: skip
            return inner(*args, **kwargs | {"attention_mask": own})

        model.model.forward = forward
        return model

    loss, grads = loss_and_gradients(with_own(copy.deepcopy(model), "back"), inputs)
    ours = with_own(copy.deepcopy(model), "back")
    convert(ours, ActivationSpec(tiers="stream", chunk=8))
    found, of_weights = loss_and_gradients(ours, inputs)
    assert torch.equal(found, loss)
    assert distance(of_weights, grads) <= 1e-12
    ours = with_own(copy.deepcopy(model), "ahead")
    convert(ours, ActivationSpec(tiers="stream", chunk=8))
    with pytest.raises(ValueError, match="attends to later tokens"):
        ours(**inputs)


class Shifting(nn.Module):
    """A norm that mixes a token into the next one, as some models do between attention and MLP."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + 0.3 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_a_layer_that_mixes_tokens_by_other_means_is_found_by_its_trial() -> None:
    model = build("llama")
    layer = model.model.layers[1]
    layer.post_attention_layernorm = Shifting(layer.post_attention_layernorm)
    convert(model, "stream")
    with pytest.raises(ValueError, match=r"cannot be streamed: on 16 tokens.*checkpoint_fp8"):
        model(**batch(TOKENS))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: setattr(m, "cross_attn", copy.deepcopy(m.self_attn)), "more than one attention"),
        (lambda m: setattr(m.mlp, "conv", nn.Conv1d(64, 64, 3)), "convolutions"),
        (lambda m: setattr(m.self_attn, "sinks", nn.Parameter(torch.zeros(4))), "a weight of its own .'sinks'"),
        (lambda m: setattr(m.self_attn, "is_kv_shared_layer", True), "shared with other layers"),
        (lambda m: setattr(m, "self_attn", nn.Linear(64, 64)), "no attention that is recognised"),
    ],
)
def test_what_tells_against_a_layer_is_said(change: Any, why: str) -> None:
    layer = build("llama").model.layers[0]
    assert why_not_streamed(layer) is None
    change(layer)
    assert re.search(why, str(why_not_streamed(layer)))


def test_a_layer_that_cannot_is_checkpointed_and_the_report_says_so() -> None:
    model = model_of("llama", num_hidden_layers=3)
    model.model.layers[1].mlp.extra = nn.Conv1d(1, 1, 1).double()
    inputs = laid_out("packed")
    loss, grads = loss_and_gradients(model, inputs)
    report = convert(model, ActivationSpec(tiers="stream", chunk=8))
    assert [layer.tier for layer in report.layers] == ["stream", "checkpoint_fp8", "stream"]
    assert "not streamed but checkpointed: its convolutions" in str(report)
    ours, found = loss_and_gradients(model, inputs)
    assert torch.equal(ours, loss)
    assert distance(found, grads) <= 1e-12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn": "flex_attention"}, "attn_implementation='flex_attention'.*Load the model with.*'sdpa'"),
        ({"family": "mixtral", "output_router_logits": True}, "output_router_logits=True.*balancing loss"),
    ],
)
def test_what_no_layer_can_do_is_refused_at_conversion(changes: dict[str, Any], words: str) -> None:
    model = build(changes.pop("family", "llama"), **changes)
    with pytest.raises(ValueError, match=words):
        convert(model, "stream")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_one_streamable_layer_is_refused() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.extra = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM can run by chunks.*convolutions.*Use"):
        convert(model, "stream_fp8")


@pytest.mark.parametrize("given", ["mask", "lazy"])
def test_eager_attention_with_left_padding_is_refused(given: str) -> None:
    """HuggingFace's is NaN there, without a tier too."""
    model = streamed(build("llama", attn="eager"), 8, "stream" if given == "lazy" else "stream:0,exact:1")
    with pytest.raises(ValueError, match=r"eager attention with left padding.*attn_implementation='sdpa'"):
        model(**laid_out("left"))


def test_a_mask_that_looks_ahead_is_refused() -> None:
    model = streamed(build("llama"), 8)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    inputs = batch(TOKENS)
    model(**inputs, attention_mask=mask).loss.backward()
    mask[..., 7, 8] = True
    with pytest.raises(ValueError, match=r"attends to later tokens.*checkpoint_fp8"):
        model(**inputs, attention_mask=mask)


def test_a_cache_with_tokens_and_huggingfaces_checkpointing_are_refused() -> None:
    model = streamed(build("llama"), 8)
    ids = batch(8)["input_ids"]
    cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="key-value cache that holds tokens"):
        model.train()(input_ids=ids, past_key_values=cache)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="HuggingFace's activation checkpointing on as well"):
        model(input_ids=ids)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"chunk": 0}, ValueError, "lowmem_stream_chunk=0: a chunk has at least one token. Set"),
        ({"chunk": -256}, ValueError, "lowmem_stream_chunk=-256: .*leave it unset"),
        ({"chunk": True}, TypeError, "lowmem_stream_chunk=True: expected a number of tokens"),
        ({"chunk": "2048"}, TypeError, "lowmem_stream_chunk='2048': expected"),
        ({"tiers": "fp8", "chunk": 8}, ValueError, "lowmem_stream_chunk=8 has no effect with lowmem_activations='fp8'"),
        ({"stochastic": True}, ValueError, "stochastic=True has no effect.*'stream'"),
        ({"tiers": "streams"}, ValueError, "Did you mean 'stream'"),
    ],
)
def test_bad_settings_are_errors_at_construction(values: dict[str, Any], error: type[Exception], words: str) -> None:
    settings: dict[str, Any] = {"tiers": "stream"} | values
    with pytest.raises(error, match=words):
        ActivationSpec(**settings)


def test_a_chunk_is_as_long_as_its_graph_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        hidden = torch.empty(1, 131072, 4096, dtype=torch.bfloat16)
    assert chunk_of(hidden, 14336) == 1024  # with a mask of chunk x keys in bf16
    monkeypatch.setattr("hf_lowmem.activations.streaming.attention.on_accelerator", lambda tensor: True)
    assert chunk_of(hidden, 14336) == 3072  # a Llama-3-8B
    assert chunk_of(hidden.expand(4, -1, -1), 14336) == 768
    assert chunk_of(hidden.expand(999, -1, -1), 14336) == 256


def test_the_stack_of_a_wrapped_model_is_found() -> None:
    """Masks are made by the module that holds the layers."""
    model = build("llama")
    convert(model, "stream")
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == [
        "model",
        "model.layers.0",
        "model.layers.1",
    ]
    assert find_stack(model)[0] == "model.layers"

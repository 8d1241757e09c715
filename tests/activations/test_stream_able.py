"""Which layers are streamed is known at conversion; and models of two threads stream at the same time."""

import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers

from hf_lowmem.activations import convert
from hf_lowmem.activations.streaming.attention import swapped
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import SMALL, loss_and_gradients
from tests.activations.streams import TOKENS, distance, laid_out, model_of, streamed

OWN: dict[str, dict[str, Any]] = {
    "MiniMax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "Phimoe": {"num_local_experts": 4, "input_jitter_noise": 0.01, "router_jitter_noise": 0.01, "head_dim": None},
    "Gemma3n": {
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    values = {key: value for key, value in (SMALL | OWN[name]).items() if value is not None}
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3n" else f"{name}Config")(**values)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def test_a_recurrence_with_a_cache_is_checkpointed() -> None:
    model, inputs = built("MiniMax"), laid_out("plain")
    loss, grads = loss_and_gradients(model, inputs)
    report = convert(model, ActivationSpec(tiers="stream", chunk=8))
    assert [layer.tier for layer in report.layers] == ["checkpoint_fp8", "stream"]
    assert "its attention hands no keys and values to a cache" in str(report)
    ours, found = loss_and_gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    late = {name: grad for name, grad in grads.items() if "layers.1." in name or "lm_head" in name}
    assert distance({name: found[name] for name in late}, late) <= 1e-5


def test_several_streams_of_activations_are_refused_at_conversion() -> None:
    with pytest.raises(ValueError, match=r"no layer of Gemma3nForCausalLM can run by chunks: .*'altup'.*Use"):
        convert(built("Gemma3n"), "stream")


def test_a_router_that_draws_is_streamed() -> None:
    """It draws chunk by chunk, the same in both passes; of one chunk what HuggingFace draws."""
    model, inputs = built("Phimoe"), laid_out("plain")

    def step(model: Any) -> Any:
        torch.manual_seed(3)
        return loss_and_gradients(model, inputs)

    (loss, grads), (one, found) = step(model), step(streamed(model, TOKENS))
    assert torch.equal(one, loss)
    assert distance(found, grads) == 0
    several = [step(streamed(model, 8)) for _ in range(2)]
    assert torch.equal(several[0][0], several[1][0])
    assert distance(several[0][1], several[1][1]) == 0


@pytest.mark.parametrize(("family", "layout"), [("llama", "plain"), ("mistral", "packed")])
def test_two_threads_stream_at_the_same_time(family: str, layout: str) -> None:
    """One leaves its chunk, and its step, while the other one is inside of a chunk."""
    inputs = laid_out(layout)
    first, second = streamed(model_of(family), 8), streamed(model_of(family), 8)
    want = loss_and_gradients(first, inputs)
    first_inside, second_inside, results, seen = threading.Event(), threading.Event(), [], {"chunks": 0}
    thread = threading.Thread(target=lambda: results.append(loss_and_gradients(first, inputs)))
    loss_and_gradients(second, inputs)  # its trial is behind it
    mlp, norm = first.model.layers[0].mlp, second.model.layers[0].input_layernorm
    of_mlp, of_norm = mlp.forward, norm.forward

    def waits_for_second(*args: Any) -> Any:
        first_inside.set()
        assert second_inside.wait(60)
        return of_mlp(*args)

    def waits_for_first(*args: Any) -> Any:
        seen["chunks"] += 1
        if seen["chunks"] == 2:
            second_inside.set()
            thread.join(60)
        return of_norm(*args)

    mlp.forward, norm.forward = waits_for_second, waits_for_first
    thread.start()
    assert first_inside.wait(60)
    results.append(loss_and_gradients(second, inputs))
    assert len(results) == 2
    for loss, grads in results:
        assert torch.equal(loss, want[0])
        assert distance(grads, want[1]) == 0


def test_an_entry_is_put_back_by_the_last_who_leaves() -> None:
    table: dict[str, Any] = {"sdpa": len}
    with ExitStack() as one, ExitStack() as two:
        one.enter_context(swapped(table, "sdpa", lambda before: [before].copy))
        ours = table["sdpa"]
        two.enter_context(swapped(table, "sdpa", lambda before: [before].copy))
        one.close()
        assert table["sdpa"] is ours
        assert ours() == [len]
        two.close()
        assert table == {"sdpa": len}
    with swapped(table, "sdpa", lambda before: print):
        table["sdpa"] = repr  # somebody's own
    assert table == {"sdpa": repr}

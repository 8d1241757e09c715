"""The 4-bit reference: what becomes small, what stays, and how far its numbers are from the full one's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lowmem.preference.reference.quantized import quantize_linears
from tests.conftest import tiny_llama
from tests.preference.reference.runs import first_batch, loss_and_gradients, policy, trainer
from tests.training.test_trainers import losses

CPU = torch.device("cpu")


def bytes_of(model: nn.Module) -> int:
    """Of all parameters, with the scales that bitsandbytes keeps beside them."""
    total = 0
    for p in {id(p): p for p in model.parameters()}.values():
        total += p.numel() * p.element_size()
        state: Any = getattr(p, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            total += state.state2.absmax.numel() * state.state2.absmax.element_size()
    return total


@pytest.mark.train
@pytest.mark.parametrize("given", ["a path", "a model", "a reference"])
def test_each_way_to_it(given: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "model"
    policy(1).save_pretrained(folder)
    passed = policy(1) if given == "a reference" else None
    model = {"a path": str(folder), "a model": policy(1), "a reference": policy(0)}[given]
    made = trainer(tmp_path / "out", tokenizer, model=model, ref_model=passed, lowmem_reference="quantized")
    assert made.reference_kind == "quantized"
    reference = made.ref_model
    small: list[Any] = [m for m in reference.modules() if isinstance(m, Linear4bit)]
    assert len(small) == 7
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in small)
    assert type(reference.get_output_embeddings()) is nn.Linear
    assert not any(p.requires_grad for p in reference.parameters())
    assert passed is None or reference is passed
    mine, its = ({p.data_ptr() for p in m.parameters()} for m in (made.model, reference))
    assert not mine & its, "the policy's updates would reach the reference"
    assert all(type(m) is nn.Linear for m in made.model.modules() if isinstance(m, nn.Linear))
    batch = first_batch(made)
    before = torch.cat(made.compute_ref_log_probs(reference, batch))
    made.train()
    assert len(losses(made)) == 4
    assert torch.equal(torch.cat(made.compute_ref_log_probs(reference, batch)), before)


def test_bytes() -> None:
    """4 bits a weight, 8 for each block of 64, 32 for each 256 of those: 4.127, and the rest as it was."""
    model = tiny_llama(hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    count = sum(m.weight.numel() for m in linears)
    full = bytes_of(model)
    small = bytes_of(quantize_linears(model, CPU))
    bits = 8 * (small - (full - 2 * count)) / count
    # The last group of scales of a matrix is rounded up: 4 bytes a matrix at most.
    assert 4 + 8 / 64 <= bits <= 4 + 8 / 64 + 32 / (64 * 256) + 8 * 4 * len(linears) / count


def test_tied_embeddings_stay_tied_and_away_from_the_policy() -> None:
    model = policy(tie_word_embeddings=True)
    shared = {id(p): p for p in model.parameters()}
    reference = quantize_linears(copy.deepcopy(model, dict(shared)), CPU, borrowed=set(shared))
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    assert reference.lm_head.weight is not model.lm_head.weight
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn\.Linear layer"):
        quantize_linears(model, CPU)


def test_the_bias_of_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    """Beside a full reference: another loss, but near; each weight is off by less than half the widest gap of nf4.

    That gap, between -1 and -0.696 of a block's largest weight, bounds a weight's error by 0.152 of it, and the double
    quantisation of the scale adds less than 1/127. What it does to log-probabilities no bound tells usefully, so the
    second half is a measurement, on weights drawn at random, which are the hardest to round.
    """
    full = policy(1)
    small = quantize_linears(policy(1), CPU)
    quantised: list[Any] = [(n, m) for n, m in small.named_modules() if isinstance(m, Linear4bit)]
    for name, m in quantised:
        linear = full.get_submodule(name)
        got = dequantize_4bit(m.weight.data, m.weight.quant_state).reshape(-1, 64)
        want = linear.weight.detach().reshape(-1, 64)
        largest = want.abs().amax(dim=1, keepdim=True)
        assert ((got - want).abs() <= (0.152 + 1 / 127) * largest).all(), name
        assert (got != want).any(), name

    runs, rates = {}, {}
    for way in ("full", "quantized"):
        made = trainer(tmp_path / way, tokenizer, ref_model=policy(1), lowmem_reference=way)
        runs[way] = loss_and_gradients(made)[0].item()
        batch = first_batch(made, 16)
        sums = torch.cat(made.compute_ref_log_probs(made.ref_model, batch))
        rates[way] = sums / batch["completion_mask"].sum(dim=1)
    assert runs["full"] != runs["quantized"]
    assert abs(runs["full"] - runs["quantized"]) < 0.01
    error = rates["quantized"] - rates["full"]
    assert 1e-4 < error.abs().mean() < 0.02  # nats a token

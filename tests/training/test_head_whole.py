"""An output head whose gradient stays whole, or is bad, or is not the only one: what is done, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.optim import StepInBackward, make_optimizer
from hf_lowmem.runs.report import read_report
from hf_lowmem.training import head as head_module
from hf_lowmem.training import head_blocks
from hf_lowmem.training.head import BlockedHead, HeadFunction
from tests.conftest import tiny_llama, word_tokenizer
from tests.training.heads import TILE, in_backward, masked_data, norms, same, train, without
from tests.training.test_trainers import settings, token_data

pytestmark = pytest.mark.train


def hooked(model: Any) -> Any:
    model.lm_head.weight.register_hook(lambda grad: grad)
    return model


WHOLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tied": (lambda: tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=True), {}, head_module.TIED),
    "hooked": (lambda: hooked(tiny_llama(dtype=torch.bfloat16)), {}, head_module.HOOKED),
    "lamb": (None, {"optim": "lamb"}, "lamb needs all of a gradient at once"),
    "accumulation": (
        None,
        {"optim": "galore", "lowmem_rank": 4, "gradient_accumulation_steps": 2},
        "its gradients are accumulated over several backward passes",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_cut_stays_whole_with_the_same_bits_and_the_report_says_why(
    case: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fields, why = WHOLE[case]
    make = make or (lambda: tiny_llama(dtype=torch.bfloat16))
    ours = train(tmp_path, model=make(), **in_backward(**fields))
    passes = 4 * fields.get("gradient_accumulation_steps", 1)
    expected = {"block_rows": TILE, "passes_by_rows": 0, "passes_whole": passes, "why": why}
    assert ours.output_head.facts() == read_report(tmp_path)["head"] == expected
    without(monkeypatch)
    same(ours, train(tmp_path, model=make(), **in_backward(**fields)))


def test_trls_own_stays_where_it_is_not_known_or_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(chunked_logprob.ChunkedLogProbFunction):
        pass

    def facts(**fields: Any) -> Any:
        train(tmp_path, **in_backward(max_steps=1, **fields))
        return read_report(tmp_path)["head"]

    nothing = {"block_rows": 0, "passes_by_rows": 0, "passes_whole": 0}
    model = tiny_llama(dtype=torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    assert facts(model=model) == nothing | {"why": "it is not trained"}
    monkeypatch.setattr(head_module, "UNFIT", "trl's function is not the one that is known here")
    assert facts() == nothing | {"why": head_module.UNFIT}
    monkeypatch.setattr(head_module, "UNFIT", None)
    monkeypatch.setattr(trl_utils, head_module.NAME, Theirs)
    assert "Theirs stands in for trl's function" in facts()["why"]
    assert getattr(trl_utils, head_module.NAME) is Theirs


@pytest.mark.parametrize("name", ["_backward_tile", "_addmm_fp32", "_use_triton", "_BLOCK_SIZE", "TOKEN_CHUNK_SIZE"])
def test_a_trl_without_a_name_that_is_needed_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head_module.UNFIT is None
    monkeypatch.delattr(chunked_logprob, name)
    assert "trl's function is not the one that is known here" in str(head_module._unfit())


def test_a_trl_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    function = chunked_logprob.ChunkedLogProbFunction
    inner = function.backward

    def halved(ctx: Any, *grads: Any) -> Any:
        return tuple(None if g is None else g / 2 for g in inner(ctx, *grads))

    monkeypatch.setattr(function, "backward", staticmethod(halved))
    assert head_module._unfit() == "trl's function is not the one that is known here (another result)"


def test_it_stands_while_trainers_train(tmp_path: Path) -> None:
    """Two at a time, taken off in any order, and after an exception."""
    trainers = [train(tmp_path / str(i), **in_backward(max_steps=1)) for i in range(2)]
    stands = lambda: getattr(trl_utils, head_module.NAME)  # noqa: E731
    assert stands() is chunked_logprob.ChunkedLogProbFunction
    heads = [trainer.output_head for trainer in trainers]
    for head in (*heads, heads[0]):
        head.put()
    heads[0].take_off()
    assert stands() is HeadFunction
    heads[1].take_off()
    assert stands() is chunked_logprob.ChunkedLogProbFunction
    with pytest.raises(KeyError):
        train_changed(tmp_path, lambda trainer, loss, inputs: {}["stopped"])
    assert stands() is chunked_logprob.ChunkedLogProbFunction
    trainers[0].train()
    assert trainers[0].output_head.facts()["passes_by_rows"] == 2
    trainers[0].create_optimizer()
    assert stands() is chunked_logprob.ChunkedLogProbFunction, "an optimizer alone is no training"


class Changed(LowMemSFTTrainer):
    """A trainer whose loss is changed by `change(trainer, loss, inputs)`."""

    change: Any

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        return type(self).change(self, loss, inputs)


def train_changed(tmp_path: Path, change: Any, **fields: Any) -> Any:
    cls = type("Changed", (Changed,), {"change": staticmethod(change)})
    args = settings(LowMemSFTConfig, tmp_path, **in_backward(**fields))
    model = tiny_llama(dtype=torch.bfloat16)
    trainer: Any = cls(model, args=args, train_dataset=token_data(), processing_class=word_tokenizer())
    trainer.train()
    return trainer


def test_a_bad_gradient_leaves_out_the_whole_head(tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(trainer: Any, loss: Any, inputs: Any) -> Any:
        return loss * float("nan") if trainer.state.global_step == 1 else loss

    ours = train_changed(tmp_path, spoil)
    assert ours.stepping.optimizer.skipped() == (12, 1, 0)
    monkeypatch.setattr(Changed, "HEAD", None)
    theirs = train_changed(tmp_path, spoil)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert theirs.stepping.optimizer.skipped() == (12, 1, 0)
    assert norms(ours) == pytest.approx(norms(theirs), rel=1e-5, nan_ok=True)
    assert torch.tensor(norms(ours)).isnan().tolist() == [False, True, False, False]


def test_a_head_that_is_passed_through_twice_has_one_step(
    tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(trainer: Any, loss: Any, inputs: Any) -> Any:
        return loss + trainer.model(**inputs, fused_lm_head=True).loss

    ours = train_changed(tmp_path, twice)
    assert ours.output_head.facts()["passes_whole"] == 8
    assert ours.output_head.why == head_module.SEVERAL
    monkeypatch.setattr(Changed, "HEAD", None)
    theirs = train_changed(tmp_path, twice)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_second_gradient_of_another_kind_is_an_error(tmp_path: Path) -> None:
    def penalised(trainer: Any, loss: Any, inputs: Any) -> Any:
        return loss + trainer.model.lm_head.weight.square().mean()

    with pytest.raises(RuntimeError, match=r"a second gradient of it has come.*Leave lowmem_step_in_backward unset"):
        train_changed(tmp_path, penalised)


def test_a_resumed_run_has_the_same_bits(tiles: None, tmp_path: Path) -> None:
    fields = in_backward(optim="apollo_mini", max_steps=6)
    whole = train(tmp_path / "whole", **fields)
    part = train(tmp_path / "part", **fields | {"save_strategy": "steps", "save_steps": 4, "max_steps": 4})
    args = settings(LowMemSFTConfig, tmp_path / "part", **fields)
    model = tiny_llama(dtype=torch.bfloat16)
    again = LowMemSFTTrainer(model, args=args, train_dataset=masked_data(), processing_class=word_tokenizer())
    again.train(resume_from_checkpoint=str(Path(part.args.output_dir) / "checkpoint-4"))
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


class Stub:
    """As much of a trainer as its head asks."""

    stepping: StepInBackward | None

    def __init__(self, stepping: StepInBackward) -> None:
        self.model: torch.nn.Module = torch.nn.Module()
        self.stepping = stepping


def test_a_gathered_head_has_its_gradient_whole() -> None:
    """FSDP2's weight is a copy that is made for each pass, and autograd hands its gradient on."""
    gradients = []
    for ours in (False, True):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 8), (600, 8)))
        head = BlockedHead(trainer := Stub(StepInBackward(make_optimizer("adamw", torch.nn.Linear(8, 600)))))
        assert trainer.stepping is not None
        if ours:
            head.put()
        function = getattr(trl_utils, head_module.NAME)
        logps, *_ = function.apply(hidden, weight * 1, None, torch.arange(5), 1.0, 32, None, 1.0, ())
        gradients.append(torch.autograd.grad(logps.sum(), (hidden, weight)))
        head.take_off()
    assert all(map(torch.equal, *gradients))
    assert head.facts() == {"block_rows": 32, "passes_by_rows": 0, "passes_whole": 1, "why": head_module.GATHERED}


@pytest.mark.parametrize(
    ("hidden", "gradient", "log_z", "good"),
    [
        (1.0, 1.0, 1.0, True),
        (1e12, 1.0, 1.0, True),
        (1e12, 1e3, 1.0, False),  # 4 tokens * 1e15 is beyond what a gradient may be
        (float("nan"), 1.0, 1.0, False),
        (1.0, float("inf"), 1.0, False),
        (1.0, 1.0, float("inf"), False),
    ],
)
def test_what_a_gradient_is_made_of_bounds_it(hidden: float, gradient: float, log_z: float, good: bool) -> None:
    class Kept:
        kernel_args = {"logit_scale": 2.0, "inv_t": 0.5}

    fill = lambda value, *shape: torch.full(shape, value)  # noqa: E731
    saved = head_blocks.Saved(fill(hidden, 4, 8), fill(1.0, 9, 8), None, torch.arange(4), fill(log_z, 4), fill(2.0, 4))
    kept: Any = Kept()
    assert bool(head_blocks.stays_finite(kept, saved, (fill(gradient, 4), None))) is good
    assert bool(head_blocks.stays_finite(kept, saved, (None, fill(gradient, 4)))) is good


@pytest.mark.parametrize("tier", ["exact", "checkpoint_fp8"])
def test_tiers_leave_it_where_it_stands(tier: str, tmp_path: Path) -> None:
    ours = train(tmp_path, **in_backward(max_steps=2, lowmem_activations=tier))
    assert ours.output_head.facts()["passes_by_rows"] == 2

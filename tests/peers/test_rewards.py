"""scripts/train_rewards.py: GRPO and RLOO with the fields, ReMax's baseline against a greedy answer made here."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_llama
from tests.test_scripts import ROOT, SMALL, model_and_data

__all__ = ["model_and_data"]  # a fixture is found by its name here


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("train_rewards")


REWARDS = """
def spread(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def short(completions, **_):
    return [-float(len(c)) for c in completions]
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return str(tmp_path / "rewards.py")


@pytest.mark.train
@pytest.mark.parametrize("kind", ["grpo", "rloo", "remax"])
def test_each_kind_trains_from_the_command(
    script: Any, kind: str, functions: str, model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    model, data = model_and_data
    flags = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "out"), *SMALL]
    flags = [f for f in flags if f not in ("--max_length", "32")]
    flags += ["--num_generations", "2", "--max_completion_length", "6", "--learning_rate", "1e-2", "--optim", "apollo"]
    flags += ["--lowmem_rank", "4", "--lowmem_activations", "checkpoint_fp8", "--lowmem_step_in_backward", "True"]
    flags += ["--max_grad_norm", "0", "--reward", f"{functions}:spread", f"{functions}:short", "--save_steps", "2"]
    flags += ["--logging_steps", "1"]
    assert script.main([kind, *flags]) == 0
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (model, tmp_path / "out")
    )
    assert any(not torch.equal(before[n], after[n]) for n in before)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    logged = state["log_history"][0]
    assert {"rewards/spread/mean", "rewards/short/mean"} <= logged.keys()


def test_remax_subtracts_the_greedy_answer_s_reward(
    script: Any, functions: str, tmp_path: Path, tokenizer: Any
) -> None:
    args = script.RlooArguments(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=8, num_generations=2,
        max_completion_length=5, beta=0.0, reward=[f"{functions}:spread"],
    )  # fmt: skip
    data: Any = Dataset.from_list([{"prompt": f"w{i} w{2 * i}"} for i in range(4)])
    model = tiny_llama(initializer_range=0.3)
    trainer = script.ReMaxTrainer(
        model, script.rewards(args.reward), args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.model.train()
    rows = [row for row in data for _ in range(2)]
    made = trainer._generate_and_score_completions(rows)
    assert {len(value) for value in made.values()} == {4}
    sampled = [
        ids[mask.bool()].tolist() for ids, mask in zip(made["completion_ids"], made["completion_mask"], strict=True)
    ]
    others = []
    for i, row in enumerate(data):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(5):  # greedy, by hand
            if ids[0, -1] == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], 1)
        answer = ids[0, tokenizer(row["prompt"], return_tensors="pt")["input_ids"].size(1) :].tolist()
        others.append(answer)
        assert float(made["advantages"][i]) == sum(sampled[i]) % 7 - sum(answer) % 7
    assert sampled != others
    assert made["advantages"].any()
    assert trainer.generation_config.do_sample


def test_what_has_no_pair_or_no_reward_is_refused(
    script: Any, functions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 4, "num_generations": 2}
    for odd, said in (
        ({"num_generations": 4}, "num_generations=4: remax pairs"),
        ({"normalize_advantages": True}, "normalize_advantages=True: remax"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "per_device_train_batch_size=1: remax"),
    ):
        args = script.RlooArguments(str(tmp_path), **(plain | odd))
        with pytest.raises(ValueError, match=said):
            script.ReMaxTrainer("none", [], args)
    for named, said in (
        (None, "reward is not set"),
        (["none.py:f"], "reward=none.py:f: there is no such file"),
        ([f"{functions}:long"], "the file has no function of that name"),
    ):
        with pytest.raises(ValueError, match=said):
            script.rewards(named)
    assert script.rewards(["some/model"]) == ["some/model"]
    assert script.main(["ppo"]) == 2
    assert "the first word is one of grpo, rloo, remax" in capsys.readouterr().err
    assert script.main([]) == 2

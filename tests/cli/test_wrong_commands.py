"""Wrong command lines: each is answered within a screen that names what to do, with status 2 and no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lowmem.cli.main import main
from tests.conftest import tiny_llama
from tests.planner.real import small_config
from tests.test_scripts import as_text, model_and_data

__all__ = ["model_and_data"]  # a fixture

SCREEN = 24
YAML = {
    "broken.yaml": "a: [1\n",
    "list.yaml": "- 1\n",
    "stranger.yaml": "lowmem_stat: int8\n",
    "text.yaml": "learning_rate: fast\n",
    "refused.yaml": "optim: adamw\nlowmem_rank: 4\n",
    "accelerate.yaml": "hf_lowmem_config:\n  optm: adamw\n",
}
CPU = ["--use_cpu", "--report_to", "none", "--output_dir", "out"]
SFT = ["sft", "--model_name_or_path", "model", "--dataset_name", "texts", *CPU]
DPO = ["dpo", "--model_name_or_path", "model", "--dataset_name", "data", *CPU]
PLAN = ["plan", "--model", "planned", "--max_length", "32"]

# (the command line, words of the answer)
WRONG: list[tuple[list[str], tuple[str, ...]]] = [
    # the program
    (["nonsense"], ("'nonsense'", "choose from", "sft")),
    ([], ("command", "hf-lowmem --help")),
    (["doctor", "--jsn"], ("--jsn", "--help")),
    (["doctor", "x"], ("x", "--help")),
    (["demo", "--seed", "x"], ("--seed", "'x'", "hf-lowmem demo --help")),
    (["card"], ("RUN", "hf-lowmem card --help")),
    (["compare"], ("RUN", "hf-lowmem compare --help")),
    (["compare", "planned", "--plot", "gone/x.png"], ("--plot gone/x.png", "no folder gone")),
    (["compare", "planned", "--plot", "x.txt"], (".png, .svg, .pdf",)),
    # training: names of fields
    ([*SFT, "--lowmem_staat", "int8"], ("--lowmem_staat", "did you mean --lowmem_state?")),
    ([*SFT, "--learning-rte", "1"], ("--learning-rte", "did you mean --learning_rate?")),
    ([*SFT, "--lowmem_activation", "fp8"], ("ambiguous", "--lowmem_activations")),
    ([*SFT, "stray"], ("stray", "hf-lowmem sft --help")),
    # and their values
    ([*SFT, "--learning_rate", "fast"], ("--learning_rate", "'fast'", "float")),
    ([*SFT, "--lowmem_rank", "many"], ("--lowmem_rank", "'many'", "int")),
    ([*SFT, "--bf16", "maybe"], ("--bf16", "maybe", "true/false")),
    ([*SFT, "--optim", "apolo"], ("optim='apolo'", "'apollo'")),
    ([*SFT, "--optim", "adamw", "--lowmem_state"], ("--lowmem_state", "expected one argument")),
    ([*SFT, "--lowmem", "tiny"], ("lowmem='tiny'", "light, balanced, smallest")),
    ([*SFT, "--dtype", "float99"], ("--dtype", "'float99'", "bfloat16")),
    ([*SFT, "--lowmem_budget", "24"], ("lowmem_budget='24'", "GiB")),
    ([*SFT, "--optim", "apollo", "--lowmem_step_in_backward"], ("max_grad_norm=1.0", "Set max_grad_norm=0")),
    ([*SFT, "--lowmem_activations", "fp8:0-9"], ("layers 0 to 0", "fp8:0-")),
    ([*SFT, "--optim", "adamw", "--resume_from_checkpoint", "out/gone"], ("out/gone", "checkpoint-N")),
    ([*SFT, "--per_device_train_batch_size", "0"], ("per_device_train_batch_size=0", "at least 1")),
    ([*SFT, "--gradient_accumulation_steps", "-1"], ("gradient_accumulation_steps=-1", "at least 1")),
    ([*SFT, "--max_length", "0"], ("max_length=0", "at least 1")),
    ([*SFT, "--num_train_epochs", "-1"], ("num_train_epochs=-1.0", "(0, inf)")),
    # what is to be trained, and on what
    (["sft", "--output_dir", "out"], ("model_name_or_path is not set", "--model_name_or_path MODEL")),
    (["sft", "--model_name_or_path", "model", "--output_dir", "out"], ("dataset_name is not set", "train.jsonl")),
    (
        ["sft", "--model_name_or_path", "gone", *SFT[3:]],
        ("model_name_or_path='gone'", "on the hub, or a folder"),
    ),
    ([*SFT, "--dataset_name", "gone"], ("dataset_name='gone'", "a name on the hub, or a folder")),
    ([*SFT, "--dataset_name", "nothing"], ("dataset_name='nothing'", "no rows")),
    ([*SFT, "--dataset_name", "broken"], ("dataset_name='broken'", "JSON")),
    ([*SFT, "--dataset_train_split", "trian"], ("'trian'", "train", "Set --dataset_train_split")),
    ([*DPO, "--dataset_name", "texts"], ("no column 'chosen'", "chosen and rejected")),
    ([*SFT, "--dataset_name", "chats"], ("no chat template", "--chat_template_path MODEL", "instruct")),
    ([*DPO, "--dataset_name", "chats"], ("no chat template", "instruct", "prompt, chosen, rejected")),
    # files
    (["sft", "--config"], ("--config", "one file")),
    (["sft", "--config", "gone.yaml"], ("--config gone.yaml", "No such file")),
    (["sft", "--config", "data"], ("--config data", "directory")),
    (["sft", "--config", "broken.yaml"], ("no YAML", "line 1")),
    (["sft", "--config", "list.yaml"], ("list.yaml", "mapping")),
    (["sft", "--config", "stranger.yaml"], ("--lowmem_stat", "did you mean --lowmem_state?")),
    (["sft", "--config=refused.yaml", *SFT[1:]], ("lowmem_rank=4", "Leave it unset")),
    # preferences
    ([*DPO, "--loss_type", "asfd"], ("loss_type='asfd'", "'asft'")),
    ([*DPO, "--loss_type", "orpo", "--asft_lambda", "1"], ("asft_lambda=1.0", "loss_type='asft'")),
    ([*DPO, "--sft_epochs", "2"], ("sft_epochs=2.0", "--sft_first")),
    ([*DPO, "--lowmem_reference", "half"], ("lowmem_reference='half'", "precomputed")),
    # plans
    (["plan"], ("--model is not set", "config.json")),
    (["plan", "--model", "gone"], ("model='gone'", "hf download")),
    ([*PLAN, "--method", "rl"], ("--method='rl'", "sft, dpo")),
    ([*PLAN, "--device", "tpu"], ("device='tpu'", "cuda, cpu")),
    ([*PLAN, "--budget", "24"], ("--budget='24'", "GiB")),
    ([*PLAN, "--max_length", "auto"], ("--max_length auto", "Give --budget")),
    ([*PLAN, "--plot", "gone/x.png"], ("--plot gone/x.png", "Make it")),
    ([*PLAN, "--plot", "planned"], (".png",)),
    # launchers
    (["launch"], ("training_script", "hf-lowmem launch --help")),
    (["launch", "--config_file", "gone.yaml", "list.yaml"], ("config_file='gone.yaml'", "no such file")),
    (["launch", "--config_file", "accelerate.yaml", "list.yaml"], ("'optm'", "optim")),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a model, data, and files that are wrong."""
    root = tmp_path_factory.mktemp("wrong")
    tiny_llama().save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    small_config(num_hidden_layers=1).save_pretrained(root / "planned")
    for folder in ("data", "texts"):
        (root / folder).mkdir()
        row = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}
        (root / folder / "train.jsonl").write_text("\n".join(json.dumps(row) for _ in range(4)))
    as_text(str(root / "texts"))
    said = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": word}] for word in ("w2", "w3")]
    for folder, text in {"chats": "", "nothing": "", "broken": '{"text": "a"\n'}.items():
        (root / folder).mkdir()
        (root / folder / "train.jsonl").write_text(text)
    (root / "chats" / "train.jsonl").write_text(
        "\n".join(json.dumps({"messages": said[0], "chosen": said[0], "rejected": said[1]}) for _ in range(4))
    )
    for name, text in YAML.items():
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words[:1] + words[-2:]) for words, _ in WRONG])
def test_an_answer_of_one_screen(
    place: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: tuple[str, ...]
) -> None:
    monkeypatch.chdir(place)
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "examples/s" not in line and "it/s" not in line]
    answer = "\n".join(lines)
    assert len(lines) <= SCREEN, answer
    assert lines[-1].startswith("hf-lowmem") or "hf-lowmem " in answer
    assert "Traceback" not in answer
    for word in said:
        assert word in answer, answer


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) >= 30
    assert {words[0] for words, _ in WRONG if words} >= {"sft", "dpo", "plan", "launch", "compare", "card", "doctor"}

"""Every block of code and every command of every README, run as it is written; what cannot be run here says why.

Python runs unchanged but for names of models, the length of a training, and that it is on a CPU. A command that takes
minutes, a GPU or the network is given to its own parser, and its row in COMMANDS says what runs it elsewhere.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import trl
import yaml
from accelerate import Accelerator
from datasets import Dataset

import hf_lowmem
from hf_lowmem.cli.screens import SCREENS
from hf_lowmem.memory import optimizer_bytes
from tests.conftest import tiny_llama
from tests.readmes import ROOT, Block, blocks, commands
from tests.test_methods import method_commands
from tests.training.test_trainers import pair_data, token_data

pytestmark = pytest.mark.train  # starts processes

TRAINS = "trains in tests/test_scripts.py"
MINUTES = "minutes to hours; at toy size in "
# The start of a command, and why it is parsed and not run. Each command has the longest start that fits.
COMMANDS = {
    "bash scripts/bench/gpu_once.sh": "needs a CUDA device; at toy size in tests/bench/test_gpu.py",
    "bash scripts/demo.sh": "installs, then minutes; its parts in tests/demo/test_demo.py",
    "bash scripts/test.sh": "is what runs this test",
    "pip install -e .": "changes the environment that runs this test",
    "pip install 'hf-lowmem[cpu]'": "changes the environment that runs this test",
    "accelerate": "another program's",
    "HF_LOWMEM_CONFIG=": "LLaMA-Factory is not installed; its glue in tests/integrations",
    "hf-lowmem card": "needs a run; tests/runs/test_commands.py",
    "hf-lowmem compare": "needs runs; tests/runs/test_commands.py",
    "hf-lowmem demo": "minutes; tests/demo/test_demo.py",
    "hf-lowmem doctor": "tests/cli/test_doctor.py",
    "hf-lowmem dpo": TRAINS,
    "hf-lowmem launch": "starts processes; tests/cli/launch",
    "hf-lowmem plan": "a name alone; tests/planner/test_command.py",
    "hf-lowmem plan --budget": "runs, slow: test_the_front_page_s_question_is_answered",
    "hf-lowmem plan --model": "runs, slow: test_a_plan_is_made",
    "hf-lowmem sft": TRAINS,
    "python scripts/bench/_readme.py": "tests/test_readme.py",
    "python scripts/bench/accumulation.py": MINUTES + "tests/bench/test_accumulation.py",
    "python scripts/bench/activations.py": MINUTES + "tests/bench/test_activations.py",
    "python scripts/bench/arithmetic.py": MINUTES + "tests/bench/test_arithmetic.py",
    "python scripts/bench/budget.py": MINUTES + "its --toy; the search in tests/planner/test_search.py",
    "python scripts/bench/cpu.py": MINUTES + "tests/bench/test_cpu.py",
    "python scripts/bench/cpu_layers.py": MINUTES + "tests/bench/test_cpu.py",
    "python scripts/bench/codecs.py": MINUTES + "its own flags; what it measures in tests/codecs/test_update_error.py",
    "python scripts/bench/embeddings.py": MINUTES + "tests/bench/test_embeddings.py",
    "python scripts/bench/kernel_targets.py": MINUTES + "tests/kernels/test_targets.py",
    "python scripts/bench/limits.py": MINUTES + "tests/bench/test_limits.py",
    "python scripts/bench/long_run.py": MINUTES + "its own flags; what it measures in tests/optim/test_long_runs.py",
    "python scripts/bench/optimizers.py": MINUTES + "tests/bench/test_optimizers.py",
    "python scripts/bench/plan_headlines.py": MINUTES + "tests/bench/test_plan.py",
    "python scripts/bench/long_sequences.py": MINUTES + "tests/bench/test_plan.py",
    "python scripts/bench/plan_table.py": MINUTES + "tests/bench/test_plan.py",
    "python scripts/bench/products.py": MINUTES + "tests/bench/test_products.py",
    "python scripts/bench/plan_vs_cpu.py": MINUTES + "tests/planner/test_truth.py",
    "python scripts/bench/plan_vs_cuda.py": "needs a CUDA device; at toy size in tests/bench/test_plan.py",
    "python scripts/bench/preference.py": MINUTES + "tests/bench/test_preference.py",
    "python scripts/bench/weights_peers.py": MINUTES + "tests/bench/test_weights_peers.py",
    "python scripts/bench/weights.py": MINUTES + "tests/bench/test_weights.py",
    "python scripts/bench/states.py": MINUTES + "its own flags; what it measures in tests/contracts",
    "python scripts/bench/recipes.py": MINUTES + "tests/bench/test_recipes.py",
    "python scripts/bench/sample.py": MINUTES + "tests/bench/test_sample.py",
    "python scripts/bench/zeroth_offload.py": MINUTES + "tests/bench/test_zeroth.py",
    "python scripts/bench/zeroth.py": MINUTES + "tests/bench/test_zeroth.py",
    "python scripts/bench/wire.py": MINUTES + "tests/dist/test_wire.py",
    "python scripts/examples/sft.py": "trains on a model of the hub; on a tiny one in tests/examples",
    "python scripts/train_gradnormlorp.py": "tests/peers/test_gradnormlorp.py",
    "python scripts/merge_checkpoints.py": "tests/peers/test_merge.py",
    "python scripts/train_welore.py": "tests/peers/test_welore.py",
    "python scripts/train_preference.py": TRAINS,
    "python scripts/train_sft.py": TRAINS,
}
# What stands for something of the reader's, in commands that are parsed.
STANDS = {"FILE": "integrations/accelerate/cpu.yaml", "NAME": "quantize"}
ON_CPU = ["--use_cpu", "--bf16", "False"]  # transformers refuses bf16 where there is no GPU


def row_of(command: str) -> str:
    return max((start for start in COMMANDS if command.startswith(start)), key=len, default="")


def test_every_command_has_a_row_and_every_row_a_command() -> None:
    rows = {command: row_of(command) for _, command in commands()}
    assert [command for command, row in rows.items() if not row] == []
    assert set(rows.values()) == set(COMMANDS)
    for reason in COMMANDS.values():
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (ROOT / path).exists(), path
        for name in re.findall(r"test_the_front_page_s_question\w*|test_a_plan_is_made", reason):
            assert name in globals()


def words_to_parse(command: str) -> list[str] | None:
    """The words for tests/readme_parser.py; None for what another program reads."""
    words = [STANDS.get(word, word) for word in shlex.split(command)]
    if words[0] not in ("python", "hf-lowmem"):
        return None
    if words[1].startswith("scripts/examples/"):  # which have no flags
        assert (ROOT / words[1]).is_file()
        assert len(words) == 2
        return None
    alone = len(words) == 2 and (words[0] == "hf-lowmem" or not words[1].startswith("scripts/bench/"))
    trains = "--model_name_or_path" in words
    every = "--help-all" if words[1] in SCREENS else "--help"  # which the parser itself prints
    return [*words, *([every] if alone and words[1] != "doctor" else []), *(ON_CPU if trains else [])]


def test_every_flag_of_every_command_is_known(tmp_path: Path) -> None:
    parsed = {command: words for _, command in commands() if (words := words_to_parse(command)) is not None}
    parsed |= {" ".join(words): words for words in method_commands()}
    asked, answered = tmp_path / "commands.json", tmp_path / "answers.json"
    unknown = [["hf-lowmem", "plan", "--budgett", "24GiB"], ["python", "scripts/bench/wire.py", "--sizess", "1"]]
    asked.write_text(json.dumps([*parsed.values(), *unknown]))
    worker = [sys.executable, str(ROOT / "tests" / "readme_parser.py"), str(asked), str(answered)]
    done = subprocess.run(worker, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *answers, at_run, at_exit = json.loads(answered.read_text())
    assert {c: a for c, a in zip(parsed, answers, strict=True) if a != "parsed"} == {}
    assert (at_run, at_exit) == ("ended without a parser", "exit status 2")


def test_shell_scripts_exist_and_their_arguments_mean_something() -> None:
    markers = (ROOT / "pyproject.toml").read_text()
    for _, command in commands():
        words = shlex.split(command)
        if words[0] != "bash":
            continue
        subprocess.run(["bash", "-n", str(ROOT / words[1])], check=True)
        if words[1] == "scripts/test.sh":
            for word in words[2:]:
                assert word == "-m" or (ROOT / word).exists() or f'"{word.removeprefix("not ")}:' in markers, command
        else:
            assert words[2:] in ([], ["--quick"]), command


def test_what_other_programs_read() -> None:
    assert version("hf-lowmem") == hf_lowmem.__version__  # pip install -e .
    for _, command in commands():
        words = shlex.split(command)
        if words[0] == "accelerate":
            assert list((Path(sys.modules["accelerate"].__file__ or "").parent / "commands").glob(f"{words[1]}*"))
        if words[0].startswith("HF_LOWMEM_CONFIG="):
            section = json.loads(words[0].partition("=")[2])
            plugin = hf_lowmem.LowMemPlugin.from_section("HF_LOWMEM_CONFIG", section)
            assert plugin.lowmem_state == "8bit"
            assert (ROOT / words[2]).is_file()


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any) -> str:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def asked(start: str, model: str) -> list[str]:
    """A README's command of `hf-lowmem`, for a small model of the reader's."""
    (command,) = [c for _, c in commands() if c.startswith(start)]
    return [model if word == "MODEL" else word for word in shlex.split(command)[1:]]


def command_line(words: list[str]) -> int:
    from tests.readme_parser import program

    return program()(words)


@pytest.mark.slow
def test_the_front_page_s_question_is_answered(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = asked("hf-lowmem plan --budget 24GiB --model MODEL --dtype", model_folder)
    assert command_line(words) == 0
    assert "is the fastest that fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_is_made(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(asked("hf-lowmem plan --model", model_folder)) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 0


class Python(NamedTuple):
    """A block of Python: what it begins with, what is replaced in it, and what must be true after it."""

    readme: str
    start: str
    replace: dict[str, str]
    then: Callable[[dict[str, Any]], Any]
    reason: str = ""  # why its training is not run


SHORT = {'"out"': '"out", **FEW'}


def trained(names: dict[str, Any]) -> bool:
    """Train what a block has built; whether the report of a run with our fields is there."""
    names["trainer"].train()
    return names["trainer"].state.global_step == 2


def reported(names: dict[str, Any]) -> bool:
    (training,) = json.loads(Path("out/lowmem_report.json").read_text())["trainings"]
    return training["finished"] and training["to_step"] == 2


PYTHON = (
    Python(
        "README.md",
        "args = LowMemSFTConfig(",
        {
            '"out",\n    bf16=torch.cuda.is_available(),': '"out", **FEW,',
            '"HuggingFaceTB/SmolLM2-135M-Instruct"': "MODEL",
        },
        reported,
    ),
    Python("README.md", 'optimizer = make_optimizer("apollo_mini"', {}, trained),
    Python(
        "hf_lowmem/activations/README.md",
        'args = LowMemSFTConfig("out", lowmem_activations="fp8")',
        SHORT,
        lambda names: names["args"].lowmem_activations == "fp8:0-11,checkpoint_fp8:12-",
    ),
    Python(
        "hf_lowmem/activations/README.md",
        'args = LowMemSFTConfig("out", max_length=131072, lowmem_activations="stream_fp8")',
        SHORT,
        lambda names: names["args"].lowmem_activation_spec().tiers == "stream_fp8",
    ),
    Python(
        "hf_lowmem/activations/README.md",
        'report = convert(model, "fp8")',
        {"...  # train": "seen = vars(model.model.layers[0])"},
        lambda names: "forward" not in vars(names["model"].model.layers[0]) and names["report"] is not None,
    ),
    Python(
        "hf_lowmem/matmul/README.md",
        'args = LowMemSFTConfig("out", lowmem_matmul="fp8_row"',
        SHORT,
        lambda names: names["args"].lowmem_matmul_spec().recipe == "fp8_row",
    ),
    Python(
        "hf_lowmem/optim/README.md",
        'optimizer = make_optimizer("apollo"',
        {},
        lambda names: (
            optimizer_bytes(names["optimizer"]) == 0 and isinstance(names["optimizer"], torch.optim.Optimizer)
        ),
    ),
    Python(
        "hf_lowmem/planner/README.md",
        'args = LowMemSFTConfig("out", optim="adamw"',
        SHORT,
        lambda names: "peak" in names["printed"][0].lower(),
    ),
    Python(
        "hf_lowmem/planner/README.md",
        'args = LowMemSFTConfig("out", lowmem_budget="24GiB"',
        SHORT,
        lambda names: names["args"].lowmem_budget == "24GiB",
        "a search takes a minute: tests/planner/test_search.py",
    ),
    Python(
        "hf_lowmem/preference/README.md",
        'args = LowMemDPOConfig("out", loss_type="asft"',
        SHORT,
        reported,
    ),
    Python(
        "hf_lowmem/training/README.md",
        "args = with_lowmem(trl.GRPOConfig)",
        {'"out"': '"out", **FEW, num_generations=2, per_device_train_batch_size=2'},
        lambda names: (
            isinstance(names["trainer"], hf_lowmem.LowMemTrainerMixin) and isinstance(names["trainer"], trl.GRPOTrainer)
        ),
        "it generates text: tests/training/test_wrap.py",
    ),
    Python("hf_lowmem/training/README.md", 'optimizer = make_optimizer("apollo_mini"', {}, trained),
    Python(
        "hf_lowmem/weights/README.md",
        'optimizer = make_optimizer("adamw"',
        {'optimizer = make_optimizer("adamw"': 'model.bfloat16()\noptimizer = make_optimizer("adamw"'},
        lambda names: (
            Path("out/lowmem_weights.safetensors").exists()
            and {type(p) for p in names["model"].parameters()} == {torch.nn.Parameter}
        ),
    ),
    Python(
        "hf_lowmem/training/README.md",
        "plugin = LowMemPlugin(",
        {},
        lambda names: names["optimizer"].optimizer.param_groups[0]["method"] == "adamw",
    ),
)


def blocks_in(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def row_of_block(block: Block) -> Python:
    (row,) = [row for row in PYTHON if row.readme == block.readme and block.start.startswith(row.start)]
    return row


def test_every_block_of_python_has_a_row() -> None:
    assert sorted(map(id, map(row_of_block, blocks_in("python")))) == sorted(map(id, PYTHON))
    assert {block.language for block in blocks()} == {"python", "bash", "yaml"}
    assert all((ROOT / row.reason.split(": ")[1]).exists() for row in PYTHON if row.reason)


def surroundings(tokenizer: Any, model_folder: str) -> dict[str, Any]:
    """What a reader has before a block: a model, data, a loop's parts, and the package's public names."""
    model = tiny_llama(hidden_size=96, num_hidden_layers=2)  # wider than the ranks of the blocks
    few: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 2}
    printed: list[str] = []
    loader = torch.utils.data.DataLoader(token_data(2).with_format("torch"))  # type: ignore[arg-type]
    prompts = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4"]})
    return {name: getattr(hf_lowmem, name) for name in hf_lowmem.__all__} | {
        "MODEL": model_folder,
        "FEW": few,
        "print": lambda value: printed.append(str(value)),
        "printed": printed,
        "trl": trl,
        "Trainer": transformers.Trainer,
        "model": model,
        "tokenizer": tokenizer,
        "processing_class": tokenizer,
        "reward": lambda completions, **kwargs: [1.0] * len(completions),
        "args": transformers.TrainingArguments("out", **few),
        "data": token_data(8),
        "prompts": prompts,
        "pairs": pair_data(8),
        "accelerator": Accelerator(cpu=True),
        "loader": loader,
        "make_scheduler": lambda optimizer: transformers.get_constant_schedule(optimizer),
    }


@pytest.mark.parametrize(
    "block", blocks_in("python"), ids=lambda block: f"{Path(block.readme).parent.name} {block.start}"
)
def test_a_block_of_python_does_what_it_says(
    block: Block, tokenizer: Any, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = Dataset.from_dict({"text": [row["prompt"] + row["chosen"] for row in pair_data(8)]})  # type: ignore[call-overload]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: texts)
    row, code = row_of_block(block), block.code
    for old, new in row.replace.items():
        assert old in code
        code = code.replace(old, new)
    names = surroundings(tokenizer, model_folder)
    if "trl.GRPO" in code:
        names |= {"data": names["prompts"], "model": model_folder}
    exec(compile(code, f"{block.readme}: {block.start}", "exec"), names)
    assert row.then(names)


def test_every_block_of_yaml_is_read_by_the_parser_that_it_is_for(tmp_path: Path) -> None:
    read = set()
    for block in blocks_in("yaml"):
        content = yaml.safe_load(block.code)
        file = tmp_path / "block.yaml"
        file.write_text(block.code)
        if "hf_lowmem_config" in content:
            plugin = hf_lowmem.LowMemPlugin.from_yaml(file)
        elif "plugins" in content:
            (name,) = content["plugins"]
            module, _, cls = name.partition(".")
            assert f"class {cls}(" in (ROOT / "integrations" / "axolotl" / f"{module}.py").read_text()
            plugin = hf_lowmem.LowMemPlugin.from_section("hf_lowmem", content["hf_lowmem"])
        else:
            parser = trl.TrlParser((hf_lowmem.LowMemSFTConfig, trl.ModelConfig))  # type: ignore[arg-type]
            words = ["--config", str(file), "--output_dir", str(tmp_path), *ON_CPU]
            plugin, _ = parser.parse_args_and_config(words)
        assert (plugin.optim, plugin.lowmem_state, plugin.lowmem_activations) == ("adamw", "8bit", "checkpoint_fp8")
        read.add(next(iter(content)))
    assert read == {"optim", "hf_lowmem_config", "plugins"}

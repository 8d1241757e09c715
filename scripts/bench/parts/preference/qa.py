"""CosmosQA's right and wrong answers, out of a PyPI package: questions about everyday stories, each with a right answer
and two or three wrong ones that people wrote to look alike.

BIG-bench 1.0.0 carries 6,500 of them in one task file. The package is 358 MB of source, nothing of which is kept but
that file. Its metadata names a dependency by a local path, which recent versions of pip refuse to take from PyPI, so
the download is done by a pip of its own, an older one, in the cache folder.
"""

import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

PACKAGE = "bigbench==1.0.0"
PIP = "pip==25.0"
MEMBER = "natural_instructions/subtask025_cosmosqa_incorrect_answer_generation/task.json"
FILE = "cosmosqa.json"


@dataclass(frozen=True)
class Question:
    """A prompt that ends where the answer begins; answers begin with a space."""

    prompt: str
    right: str
    wrong: str


def fetch(cache: Path) -> Path:
    """The task file, downloaded into `cache` once.

    Raises:
        RuntimeError: where pip cannot have the package; with what it said, and what to do.
    """
    path = cache / FILE
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run("-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/pip", PIP)
        _run(f"{folder}/pip/pip", "download", "--no-deps", "--no-binary", "bigbench", "-d", folder, PACKAGE)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            member = next((m for m in tar if m.name.endswith(MEMBER)), None)
            file = tar.extractfile(member) if member else None
            if file is None:
                raise RuntimeError(f"{PACKAGE} holds no {MEMBER}: its author has replaced the package.")
            partial = path.with_suffix(".partial")
            partial.write_bytes(file.read())
    partial.rename(path)
    return path


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(
            f"The answers of CosmosQA come from {PACKAGE} (358 MB of PyPI), which pip could not download: "
            f"{said[-1] if said else 'it said nothing'}. Connect this machine to an index that has it, or copy {FILE} "
            "from the cache folder of one where this has run (--cache)."
        )


def read(path: Path, tokenizer: Any, *, prompt_tokens: int, answer_tokens: int) -> list[Question]:
    """The questions of the file that are short enough, one of each story, in a fixed random order.

    A story in two questions would put one half of what it says on either side of a split.
    """
    rng = random.Random(0)
    by_story: dict[str, Question] = {}
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        story, _, rest = example["input"].partition("\nQuestion:")
        question, _, right = rest.partition("\nCorrect Answer:")
        story = story.removeprefix("Context:").strip()
        wrong = rng.choice(example["target"]).strip()
        found = Question(f"{story}\nQuestion: {question.strip()}\nAnswer:", f" {right.strip()}", f" {wrong}")
        lengths = [len(ids) for ids in tokenizer([found.prompt, found.right, found.wrong])["input_ids"]]
        if lengths[0] <= prompt_tokens and max(lengths[1:]) <= answer_tokens and right.strip() != wrong:
            by_story.setdefault(story, found)
    questions = list(by_story.values())
    rng.shuffle(questions)
    return questions


def toy() -> list[Question]:
    """Questions that need no download: what comes after a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        Question(f"{a} is followed by what?\nAnswer:", f" {b}", f" {c}")
        for a, b, c in zip(letters, letters[1:], letters[2:], strict=False)
    ]


def preferences(questions: Sequence[Question]) -> Dataset:
    """Columns prompt, chosen and rejected."""
    return Dataset.from_dict(
        {
            "prompt": [q.prompt for q in questions],
            "chosen": [q.right for q in questions],
            "rejected": [q.wrong for q in questions],
        }
    )

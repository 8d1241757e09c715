"""Reads every README as its parts: prose, blocks of code, commands, tables, links."""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "scripts" / "bench"
RECORDS = BENCH / "records"
READMES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / ".github" / "CONTRIBUTING.md",
        ROOT / "integrations" / "README.md",
        *sorted([*ROOT.glob("hf_lowmem/**/README.md"), *ROOT.glob("scripts/**/README.md")]),
    )
}
PROGRAMS = ("python", "bash", "hf-lowmem", "pip", "accelerate", "torchrun", "pytest")
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_MARKED = re.compile(r"<!-- table: \w+ -->\n.*?<!-- end -->", re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")


class Block(NamedTuple):
    """A fenced block of code, without indentation."""

    readme: str
    language: str
    code: str

    @property
    def start(self) -> str:
        """Its first line that says something."""
        return next(line for line in self.code.splitlines() if line and not line.startswith(("from ", "import ")))


def blocks() -> list[Block]:
    return [
        Block(name, language, textwrap.dedent(code))
        for name, text in READMES.items()
        for _, language, code in _FENCED.findall(text)
    ]


def commands() -> list[tuple[str, str]]:
    """(README, command) of every line of a shell block and of every inline code that begins with a program's name."""
    found = []
    for block in blocks():
        if block.language == "bash":
            joined = block.code.replace("\\\n", " ")
            found += [(block.readme, _clean(line)) for line in joined.splitlines() if line.strip()]
    for name, text in READMES.items():
        spans = [" ".join(span.split()) for span in _CODE.findall(_FENCED.sub("", text))]
        found += [(name, span) for span in spans if span.split()[0] in PROGRAMS and len(span.split()) > 1]
    return list(dict.fromkeys(found))


def _clean(line: str) -> str:
    return " ".join(re.sub(r"\s+#.*", "", line).split())


def by_hand(text: str) -> str:
    """What somebody has written: no generated tables, no code, no addresses."""
    text = _CODE.sub("", _FENCED.sub("", _MARKED.sub("", text)))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"arXiv \d{4}\.\d{5}", "", text)


def inline_code(text: str) -> list[str]:
    return [" ".join(span.split()) for span in _CODE.findall(_FENCED.sub("", text))]

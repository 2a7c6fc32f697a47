"""What README.md, docs/ and the READMEs of deploy/ and examples/ tell their readers to type: commands, and Python."""

import ast
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md"), *ROOT.glob("examples/*/README.md")]
)
_FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:(?: {4}.*)?\n)+)", re.M)
#: What ends one command and begins another, in a list of words.
_BETWEEN = {"&&", "||", ";", "|", "(", ")"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page, by the line it begins in."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Blocks of a page, fenced and indented."""
    text, found = page.read_text(), []
    name = str(page.relative_to(ROOT))
    for match in _FENCED.finditer(text):
        found.append(Block(name, text[: match.start()].count("\n") + 2, match[2]))
    without = _FENCED.sub(lambda m: "\n" * m[0].count("\n"), text)
    for match in _INDENTED.finditer(without):
        first = without[: match.start()].count("\n") + 1
        for part in re.finditer(r"(?:.*\S.*\n)+", match[1]):  # a blank line parts shell from Python
            found.append(Block(name, first + match[1][: part.start()].count("\n"), textwrap.dedent(part[0])))
    return found


def python_of(block: Block) -> str | None:
    """The block where it is Python; what a terminal shows ("$ ...") is not."""
    try:
        ast.parse(block.text)
    except SyntaxError:
        return None
    return block.text if re.search(r"^(import|from) \w", block.text, re.M) else None


def commands_of(block: Block) -> list[list[str]]:
    """Each command of a block as its words; of what a terminal shows those behind "$ "."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines for words in split(line)]


def split(line: str) -> list[list[str]]:
    """["make demo && ls | wc", ...] -> [["make", "demo"], ["ls"], ["wc"]]; words that only redirect are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
    lexer.whitespace_split = True
    lexer.commenters = ""  # a # within a word is none
    commands, words, skip = [], [], False
    for word in lexer:
        if word.startswith("#"):
            break
        if word in _BETWEEN:
            commands, words = [*commands, words], []
        elif word in (">", "<", ">>"):
            skip = True
        elif skip:
            skip = False
        else:
            words.append(word)
    return [words for words in [*commands, words] if words]


#: All blocks of all pages, and the commands of those that are no Python.
ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, words) for block in ALL if python_of(block) is None for words in commands_of(block)]

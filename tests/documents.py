"""Reads our own documents: their blocks of code, tables, and the words in code type.

A block begins with a fence and what it is. In docs/practice-*.md these are

    sh run [exit=N]   run by the tests, in order, in one shell; ends with N, default 0
    sh                for a cloud or another machine: only looked at
    toml config       part of tdxd.toml;  toml policy: part of a policy
    text              below `sh run`: lines of its output, in order; `…` stands for anything
    text status       lines that the last `tdxctl status` of the run printed
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

__all__ = ["Block", "Command", "blocks_of", "code_words", "commands_of", "matches"]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_HEREDOC = re.compile(r"<<(\w+)\n.*?^\1$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_SEPARATORS = {"&&", "||", "|", ";", "&", "(", ")", "$(", "!"}
_KEYWORDS = {"until", "do", "done", "if", "then", "fi", "while", "else"}


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A block of code; `line` is where its fence stands in the file."""

    path: Path
    line: int
    info: str
    body: str

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.path.name}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the tests run it."""
        return self.info.split()[:2] == ["sh", "run"]

    @property
    def exit_code(self) -> int:
        """What a block that runs ends with."""
        found = re.search(r" exit=(\d+)$", self.info)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One simple command: the program, and its words."""

    program: str
    words: tuple[str, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The long options, without their values."""
        return tuple(
            word.partition("=")[0] for word in self.words if word.startswith("--")
        )


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def code_words(path: Path) -> list[str]:
    """Return what stands in code type between the blocks; a line's end is a blank there."""
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    joined = re.sub(r"(?<!\n)\n(?![\n|#*-])", " ", prose)
    return _INLINE.findall(joined)


def commands_of(shell: str) -> list[Command]:
    """Return the simple commands of a shell text, as far as documents have them."""
    plain = _HEREDOC.sub("", shell).replace("\\\n", " ")
    plain = re.sub(r"^#.*$|\s# .*$", "", plain, flags=re.MULTILINE)
    plain, inner = _without_substitutions(plain)
    found = [command for text in inner for command in commands_of(text)]
    for line in _logical_lines(plain):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>!")
        lexer.whitespace_split = True
        found += _simple([*lexer])
    return found


def _without_substitutions(text: str) -> tuple[str, list[str]]:
    """Replace each `$(…)` by a word; return them, too."""
    inner: list[str] = []
    while (start := text.find("$(")) >= 0:
        depth, end = 1, start + 2
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        inner.append(text[start + 2 : end - 1])
        text = f"{text[:start]}SUBSTITUTED{text[end:]}"
    return text, inner


def _logical_lines(text: str) -> list[str]:
    """Join lines whose quotes are open."""
    lines: list[str] = []
    held = ""
    for line in text.splitlines():
        held = f"{held}\n{line}" if held else line
        if held.count("'") % 2 == 0 and held.count('"') % 2 == 0:
            lines.append(held)
            held = ""
    assert not held, f"an open quote: {held}"
    return lines


def _simple(words: list[str]) -> list[Command]:
    found: list[Command] = []
    current: list[str] = []
    for word in [*words, ";"]:
        if word in _SEPARATORS or (word in _KEYWORDS and not current):
            if current:
                found.append(Command(current[0], tuple(current[1:])))
            current = []
        elif current or not _ASSIGNMENT.match(word):
            current.append(word)
    return found


def matches(pattern: str, text: str) -> bool:
    """Say whether a text is as a document shows it, with `…` for what differs."""
    parts = [re.escape(part) for part in pattern.split("…")]
    return re.fullmatch(".*?".join(parts), text, re.DOTALL) is not None

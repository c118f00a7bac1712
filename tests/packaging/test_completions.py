"""Completions, asked as bash asks them, against the programs' own argument parsers."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from collections.abc import Iterator

import pytest

from contrib.completions.bash import completion
from contrib.deb.packages import PACKAGES

PROGRAMS = {
    name: module
    for package in PACKAGES.values()
    for name, module in package.programs.items()
    if name != "tdx-model-server"
}
ASK = """
{completion}
COMP_WORDS=({words} "")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_WORDS[COMP_CWORD]={last!r}
_{function}
printf '%s\\n' "${{COMPREPLY[@]-}}"
"""


def ask(name: str, line: str, last: str) -> set[str]:
    """Return what bash offers for the last word of a command line."""
    text = completion(name, PROGRAMS[name])
    script = ASK.format(
        completion=text,
        words=f"{name} {line}",
        last=last,
        function=name.replace("-", "_"),
    )
    done = subprocess.run(
        ["bash", "--norc", "-uc", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def parsers(
    name: str,
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser, set[str]]]:
    """Yield each verb of a program with its parser and its own subcommands."""

    def walk(path, parser):
        below = {}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                below = dict(action.choices)
        yield path, parser, set(below)
        for verb, other in below.items():
            yield from walk((*path, verb), other)

    yield from walk((), importlib.import_module(PROGRAMS[name])._parser())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_verb_and_option_is_offered_where_it_is_valid(name: str) -> None:
    seen = 0
    for path, parser, verbs in parsers(name):
        line = " ".join(path)
        options = {
            word
            for one in parser._actions
            if one.help != argparse.SUPPRESS
            for word in one.option_strings
        }
        assert ask(name, line, "-") == options, line
        assert verbs <= ask(name, line, ""), line
        seen += len(verbs)
    assert seen == 0 or len(list(parsers(name))) == seen + 1


def test_a_begun_word_is_completed() -> None:
    assert ask("tdxctl", "", "unm") == {"unmount"}
    assert ask("tdxctl", "--socket /run/x", "stat") == {"status"}
    assert ask("tdxctl", "health", "") == {"live", "ready"}
    assert ask("tdx-keyd", "policy", "s") == {"set", "show"}
    assert "--json" in ask("tdx-keyd", "policy set", "--")


def test_where_a_value_follows_files_are_left_to_bash() -> None:
    assert ask("tdxd", "--config", "") == set()
    assert ask("tdxctl", "--socket", "") == set()
    assert "complete -o default" in (completion("tdxd", PROGRAMS["tdxd"]) or "")


def test_a_program_without_a_parser_has_none() -> None:
    assert completion("tdx-model-server", "tdxd.cli.tdx_model_server") is None

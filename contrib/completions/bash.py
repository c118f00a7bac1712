"""Makes a program's bash completion from its own argument parser, so that the two agree."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

__all__ = ["completion"]

_TEXT = """\
# Completion of {name}, made from its own options.
_{function}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}}
    local verb= options= words= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$verb ${{COMP_WORDS[i]}}" in
        {verbs}) verb+=" ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$verb" in
{cases}
    esac
    case "$verb $prev" in
    {valued}) return ;; # a value follows: file names, by default
    esac
    [[ $cur == -* ]] && words=$options
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _{function} {name}
"""


def completion(name: str, module: str) -> str | None:
    """Return the completion of a program; None if it has no argument parser.

    `module` defines `_parser()`. Verbs, options and choices are completed by name, else files.
    """
    make = getattr(importlib.import_module(module), "_parser", None)
    if make is None:
        return None
    verbs, cases, valued = [], [], []
    for path, parser in _with_verbs("", make()):
        options = [
            word
            for one in parser._actions  # noqa: SLF001
            if one.help != argparse.SUPPRESS
            for word in one.option_strings
        ]
        words = [word for one in parser._actions for word in _words(one)]  # noqa: SLF001
        verbs += [f'"{path} {verb}"' for verb in _verbs(parser)]
        valued += [
            f'"{path} {word}"'
            for one in parser._actions  # noqa: SLF001
            if one.option_strings and one.nargs != 0
            for word in one.option_strings
        ]
        cases.append(
            f'    "{path}") options="{" ".join(options)}" words="{" ".join(words)}" ;;'
        )
    return _TEXT.format(
        name=name,
        function=name.replace("-", "_"),
        verbs=" | ".join(verbs) or '""',
        cases="\n".join(cases),
        valued=" | ".join(valued) or '""',
    )


def _words(action: argparse.Action) -> Iterator[str]:
    """Yield what may stand for a positional argument: verbs, or choices."""
    if not action.option_strings and action.choices is not None:
        yield from map(str, action.choices)


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


def _with_verbs(
    path: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield path, parser
    for verb, below in _verbs(parser).items():
        yield from _with_verbs(f"{path} {verb}", below)

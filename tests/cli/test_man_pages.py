"""Man pages and programs name the same options; pages and links are right."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.core import config

ROOT = Path(__file__).parents[2]
MAN = ROOT / "contrib" / "man"
PROGRAMS = {
    "tdxd": "tdxd.8",
    "tdxctl": "tdxctl.1",
    "tdx-seal": "tdx-seal.1",
    "tdx-keyd": "tdx-keyd.8",
    "tdx-convert": "tdx-convert.1",
    "tdx-infer": "tdx-infer.1",
    "tdx-model-server": "tdx-model-server.1",
    "tdx-sim": "tdx-sim.1",
}
PAGES = sorted({*PROGRAMS.values(), "tdxd.toml.5"})
README_MAX_WORDS = 600
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
VERB = re.compile(r"^    ([a-z][a-z-]*)(?:\s{2,}|$)", re.MULTILINE)
"""A subcommand as argparse lists it: four columns in; help texts start far to the right."""


def module_of(program: str) -> str:
    name = "tdxd.cli." + program.replace("-", "_")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} does not exist")
    return name


@functools.cache
def help_text(program: str, *verb: str) -> str:
    argv = [sys.executable, "-m", module_of(program), *verb, "--help"]
    env = {**os.environ, "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        argv,
        check=False,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def verbs_of(program: str, *verb: str) -> tuple[tuple[str, ...], ...]:
    """Return every subcommand below, those of subcommands, too."""
    found = []
    for name in VERB.findall(help_text(program, *verb)):
        found += [(*verb, name), *verbs_of(program, *verb, name)]
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Page:
    """A man page without its typography. `sections` are its .SS headings and their text."""

    text: str
    sections: tuple[tuple[str, str], ...]


def page_of(name: str) -> Page:
    plain = (MAN / name).read_text(encoding="ascii")
    plain = re.sub(r"\\f[RBIP]", "", plain).replace("\\-", "-")
    parts = re.split(r"^\.(SS|SH) (.*)$", plain, flags=re.MULTILINE)
    triples = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    sections = [(title, body) for kind, title, body in triples if kind == "SS"]
    return Page(text=plain, sections=tuple(sections))


def own_options(program: str, text: str) -> set[str]:
    """Return the options in a text, apart from lines that are about another program.

    A line that ends in a backslash is continued by the next.
    """
    others = [name for name in PROGRAMS if name != program]
    found: set[str] = set()
    for line in re.sub(r"\\[e\\]\n", "", text).splitlines():
        words = re.findall(r"[\w.-]+", line)
        if not set(words) & set(others):
            found |= set(OPTION.findall(line))
    return found


def options_of_help(program: str, *verb: str) -> set[str]:
    return set(OPTION.findall(help_text(program, *verb)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_man_page_and_program_have_the_same_options(program: str) -> None:
    in_help = options_of_help(program)
    for verb in verbs_of(program):
        in_help |= options_of_help(program, *verb)
    assert own_options(program, page_of(PROGRAMS[program]).text) == in_help


@pytest.mark.parametrize(
    "program", [name for name in PROGRAMS if name != "tdx-model-server"]
)
def test_each_subcommand_has_its_section_with_its_options(program: str) -> None:
    leaves = [verb for verb in verbs_of(program) if not verbs_of(program, *verb)]
    sections = page_of(PROGRAMS[program]).sections
    assert len(sections) == len(leaves)
    for verb in leaves:
        words = list(verb)
        bodies = [
            body for title, body in sections if title.split()[: len(words)] == words
        ]
        assert len(bodies) == 1, f"{program} {' '.join(verb)}: no section of its own"
        # An option under .TP is the verb's own: it must be in the help of this very verb.
        tags = re.findall(r"^\.TP\n(.*)$", bodies[0], flags=re.MULTILINE)
        for option in own_options(program, "\n".join(tags)):
            assert option in options_of_help(program, *verb), (verb, option)


def test_the_check_sees_a_missing_and_a_surplus_option() -> None:
    text = page_of("tdxctl.1").text
    assert "--socket" in own_options("tdxctl", text)
    assert "--bundle" not in own_options("tdxctl", "tdx-seal create d --bundle b")
    assert "--more" in own_options("tdxctl", text + "\n.B --more\n")


def test_the_configuration_page_names_every_key() -> None:
    """Each table of the page explains exactly the keys of the class that decodes it."""
    plain = page_of("tdxd.toml.5").text
    tables = dict(
        re.findall(
            r"^\.SH \[+([\w.]+)\]+\n(.*?)(?=^\.SH )", plain, re.MULTILINE | re.DOTALL
        )
    )
    classes = {
        "key_release": config.KeyReleaseConfig,
        "platform": config.PlatformConfig,
        "volume": config.VolumeConfig,
        "mapping": config.MapperConfig,
        "serving": config.ServingConfig,
        "serving.batching": config.BatchingConfig,
        "serving.model": config.ServedModelConfig,
        "health": config.HealthConfig,
        "control": config.ControlConfig,
        "security": config.SecurityConfig,
    }
    assert set(tables) == set(classes)
    top = {name for name in classes if "." not in name}
    assert top == {field.name for field in dataclasses.fields(config.Config)}
    for name, text in tables.items():
        tags = " ".join(re.findall(r"^\.TP\n\.BR? (.*)$", text, flags=re.MULTILINE))
        in_page = set(re.findall(r"[a-z][a-z_]*", tags))
        assert in_page == {field.name for field in dataclasses.fields(classes[name])}


def test_the_example_configuration_is_valid() -> None:
    plain = page_of("tdxd.toml.5").text
    example = plain.partition(".SH EXAMPLES\n.nf\n")[2].partition(".fi")[0]
    key = "A" * 43 + "="
    parsed = config.parse_config([("page", example.replace("BASE64", key))])
    assert parsed.volume[0].id == "digits"


@pytest.mark.parametrize("name", PAGES)
def test_groff_finds_no_fault(name: str) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    argv = [groff, "-z", "-ww", "-man", "-Tascii", "-rLL=78n", str(MAN / name)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", PAGES)
def test_every_page_named_as_a_relative_exists(name: str) -> None:
    see = page_of(name).text.partition(".SH SEE ALSO\n")[2]
    named = re.findall(r"^\.BR ([\w.-]+) \((\d)\)", see, flags=re.MULTILINE)
    assert named
    for title, section in named:
        if title != "cryptsetup":
            assert f"{title}.{section}" in PAGES


def test_the_readme_is_short() -> None:
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert 100 < len(words) <= README_MAX_WORDS


def test_links_of_the_documents_lead_somewhere() -> None:
    """Every relative link of the README, the changelog and docs/ names a file that is there."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_test_that_the_threats_name_exists() -> None:
    text = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)::(test_\w+)`", text)
    assert len(named) > 40
    for module, function in named:
        path = ROOT / "tests" / f"{module}.py"
        assert path.exists(), module
        defined = re.search(
            rf"^(async )?def {function}\(", path.read_text("utf-8"), re.MULTILINE
        )
        assert defined, f"{module}::{function}"

"""The documents of the practice, looked at: commands, keys, paths and the doctor's words are true.

What needs no cloud is run by tests/system/test_practice.py; this is about all the rest.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core import config, policy
from tdxd.guest import doctor
from tdxd.guest.finding import Finding
from tdxd.host.facts import Problem
from tdxd.owner.server.config import KeydConfig
from tests.cli.test_man_pages import PROGRAMS, help_text, options_of_help, verbs_of
from tests.documents import Block, Command, blocks_of, code_words, commands_of, matches
from tests.guest_unit.test_doctor import CASES, HEALTHY, SERVER, challenge, changed

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "docs" / name
    for name in ("practice-any-cloud.md", "practice-aliyun.md", "guest-image.md")
]
TROUBLES = DOCUMENTS[0]
INFOS = {"sh", "toml config", "toml policy", "text", "text status"}
OTHERS = {
    *("aliyun", "gcloud", "qemu-system-x86_64", "systemctl", "apt-get", "make"),
    *("dd", "scp", "ssh", "curl", "tar", "truncate", "mke2fs", "cp", "mkdir", "rmdir"),
    *("cat", "head", "sed", "grep", "tee", "test", "sleep", "kill", "wait", "export"),
    *("python3", "modprobe", "swapoff", "journalctl", "sudo", "exit", "apt", "chmod"),
}
"""Programs that are not ours; what they are told is for people to check."""
KEY_PIN = (
    '[key_release]\nservers = ["keys.example.com:50051"]\n'
    f'ca = "/etc/tdxd/keyd-ca.pem"\nsigning_key = "ed25519:{"A" * 43}="\n'
)
POLICY = """\
[tdx]
mrtd = ["{0}"]
td_attributes = ["SEPT_VE_DISABLE"]
tcb_status = ["UpToDate"]
platforms = "any"
[[tdx.rtmr]]
name = "image-1"
rtmr0 = "{0}"
rtmr1 = "{0}"
rtmr2 = "{0}"
rtmr3 = "{0}"
""".format("ab" * 48)
BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def of_kind(*infos: str) -> list[Block]:
    return [block for block in BLOCKS if block.info in infos]


def shell_texts() -> Iterator[tuple[str, str]]:
    """Yield all that a reader might type: blocks, and code type that begins with a program."""
    for block in BLOCKS:
        if block.info.split()[0] == "sh":
            yield block.place, block.body
    for path in DOCUMENTS:
        for words in code_words(path):
            if words.split()[0] in PROGRAMS or words.startswith(
                ("make ", "systemctl ")
            ):
                yield path.name, words


def all_commands() -> list[tuple[str, Command]]:
    return [
        (place, command)
        for place, text in shell_texts()
        for command in commands_of(text)
    ]


def test_there_is_something_to_look_at() -> None:
    assert {block.info for block in BLOCKS if not block.runs} == INFOS
    ours = {command.program for _place, command in all_commands()} & set(PROGRAMS)
    assert ours == {
        "tdxd",
        "tdxctl",
        "tdx-seal",
        "tdx-keyd",
        "tdx-sim",
        "tdx-infer",
        "tdx-convert",
    }


def test_every_program_is_ours_or_well_known() -> None:
    strange = {
        f"{place}: {command.program}"
        for place, command in all_commands()
        if command.program not in OTHERS | set(PROGRAMS)
    }
    assert not strange


def verb_of(command: Command) -> tuple[str, ...]:
    """Return the words after the options in front that are a verb of the program."""
    words = list(command.words)
    while words and words[0].startswith("-"):
        del words[:2]  # the option, and its value
    known = set(verbs_of(command.program))
    return next(
        (
            tuple(words[:length])
            for length in range(len(words), 0, -1)
            if tuple(words[:length]) in known
        ),
        (),
    )


@pytest.mark.parametrize("program", sorted(set(PROGRAMS)))
def test_verbs_and_options_of_our_programs_exist(program: str) -> None:
    for place, command in all_commands():
        if command.program != program:
            continue
        if not command.words:  # its name alone, in a sentence
            continue
        verb = verb_of(command)
        assert verb or not verbs_of(program) or program == "tdxd", (place, command)
        allowed = options_of_help(program) | {"--help"}
        for depth in range(1, len(verb) + 1):
            allowed |= options_of_help(program, *verb[:depth])
        assert set(command.options) <= allowed, (place, command)
        short = {word for word in command.words if re.fullmatch(r"-[a-z]", word)}
        text = help_text(program, *verb)
        assert all(re.search(rf"(?<!\S){word}\b", text) for word in short), (
            place,
            short,
        )


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    words = [
        word
        for _place, command in all_commands()
        if command.program == "make"
        for word in command.words
    ]
    for word in words:
        variable, _, value = word.partition("=")
        assert not value or f"$({variable}" in makefile, word
    targets = [word for word in words if "=" not in word]
    assert "guest-image" in targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_of_ours_that_is_named_exists() -> None:
    pattern = re.compile(r"(?<![\w/.-])(?:contrib|docs|systemd|tests|tdxd)/[\w./-]+\w")
    for path in DOCUMENTS:
        named = pattern.findall(path.read_text(encoding="utf-8"))
        named += re.findall(r'"\$TDXD"/([\w./-]+)', path.read_text(encoding="utf-8"))
        for name in named:
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_every_unit_of_ours_that_is_named_exists() -> None:
    for place, command in all_commands():
        for word in command.words if command.program == "systemctl" else ():
            if word.startswith("tdx"):
                unit = ROOT / "systemd" / f"{word.removesuffix('.service')}.service"
                assert unit.exists(), (place, word)


@pytest.mark.parametrize("block", of_kind("toml config"), ids=lambda one: one.place)
def test_every_part_of_a_configuration_is_read(block: Block) -> None:
    more = "" if "[[volume]]" in block.body else '[[volume]]\nid = "m"\nimage = "/m"\n'
    text = (KEY_PIN if "[key_release]" not in block.body else "") + block.body + more
    parsed = config.parse_config([(block.place, text)])
    assert parsed.volume


@pytest.mark.parametrize("block", of_kind("toml policy"), ids=lambda one: one.place)
def test_every_part_of_a_policy_is_read(block: Block) -> None:
    whole = block.body if "[tdx]" in block.body else POLICY + block.body
    policy.parse_policy(whole, source=block.place)


def dataclasses_in(annotation: object) -> Iterator[type]:
    """Yield the dataclasses that a field may hold."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
    is_union = isinstance(annotation, types.UnionType)
    if typing.get_origin(annotation) is not None or is_union:
        for one in typing.get_args(annotation):
            yield from dataclasses_in(one)


def keys_of(kind: type) -> set[str]:
    """Return the dotted keys of what a dataclass is decoded from, and each key alone."""
    found: set[str] = set()
    for name, annotation in typing.get_type_hints(kind).items():
        found.add(name)
        for inner in dataclasses_in(annotation):
            found |= {f"{name}.{key}" for key in keys_of(inner)}
    return found


def test_every_dotted_key_in_the_text_exists() -> None:
    known = keys_of(config.Config) | keys_of(policy.Policy) | keys_of(KeydConfig)
    tables = {key.partition(".")[0] for key in known if "." in key}
    seen = []
    for path in DOCUMENTS:
        for words in code_words(path):
            key = words.partition(" = ")[0]
            if re.fullmatch(r"[a-z_]+\.[a-z_]+", key) and key.split(".")[0] in tables:
                seen.append(key)
                assert key in known, f"{path.name}: {key}"
            table = re.fullmatch(r"\[+([a-z_.]+)\]+ ([a-z_]+)( = .*)?", words)
            if table:
                assert f"{table[1]}.{table[2]}" in known, f"{path.name}: {words}"
    assert "platform.evidence" in seen


def findings() -> list[Finding]:
    """Return all that the doctor of a guest can say, as far as its own tests know it."""
    servers = [
        dataclasses.replace(SERVER, step=step, problem=Problem("why", "do this"))
        for step in ("name", "connection", "certificate", "challenge")
    ]
    other_pin = dataclasses.replace(SERVER, challenge=challenge(bytes(32)))
    late = dataclasses.replace(SERVER, clock_ahead_s=7200.0)
    facts = [changed(**changes) for _name, changes, _level, _words in CASES]
    facts += [changed(servers=(one,)) for one in (*servers, other_pin, late)]
    return [one for each in (HEALTHY, *facts) for one in doctor.diagnose(each)]


def troubles() -> list[tuple[str, str]]:
    """Return the rows of the table of troubles: the finding's name, and its words."""
    text = TROUBLES.read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z0-9-]+)` \| `([^`]+)` \| .+ \|$", text, re.MULTILINE)


def test_the_table_of_troubles_has_the_doctors_own_words() -> None:
    bad = [one for one in findings() if one.level != "ok"]
    rows = troubles()
    assert len(rows) > 30
    for name, words in rows:
        said = [one.text for one in bad if one.name.split()[0] == name]
        assert any(matches(words, text) for text in said), (name, words, said)


def test_no_trouble_is_without_a_row() -> None:
    named = {name for name, _words in troubles()}
    missing = {one.name.split()[0] for one in findings() if one.level != "ok"} - named
    assert not missing


def test_the_reader_of_documents_sees_what_is_wrong() -> None:
    (one,) = commands_of("KEYS=x tdx-keyd \\\n    init store --name $KEYS | tee pin")[
        :1
    ]
    assert (one.program, one.options) == ("tdx-keyd", ("--name",))
    names = [one.program for one in commands_of("until grep -q x y; do sleep 1; done")]
    assert names == ["grep", "sleep"]
    names = [
        one.program for one in commands_of('A=$(tdx-sim root p)\nB="--x $(tdx-seal y)"')
    ]
    assert {"tdx-sim", "tdx-seal"} <= set(names)
    assert verb_of(Command("tdx-keyd", ("policy", "set", "keys", "m", "f"))) == (
        *("policy", "set"),
    )
    assert verb_of(Command("tdx-keyd", ("no-such", "keys"))) == ()
    assert matches("no quote: …", "no quote: why")
    assert not matches("no quote: …", "a quote")

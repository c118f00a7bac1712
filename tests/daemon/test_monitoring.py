"""Alert rules, dashboards and docs/monitoring.md use the metrics that exist, and all of them."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import promql_parser as promql
import pytest
import yaml

from tdxd import errors
from tdxd.core.plan import ServingState, VolumeState
from tdxd.errors import IntegrityError, UnreachableError
from tdxd.guest import metrics
from tdxd.guest.front_metrics import front_families
from tdxd.guest.metrics import metrics_text
from tdxd.owner.appraisal.judge import REASONS
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.server.metrics import Tally, Totals
from tests.daemon.test_daemon import World, state
from tests.daemon.test_lease import LEASE_S, jump, names
from tests.keyserver import opened_owner, serving
from tests.scrape import Scrape

ROOT = Path(__file__).parents[2]
FILES = ROOT / "contrib" / "monitoring"
TARGET_LABELS = {"job", "instance"}
"""Prometheus adds them to every sample; `up` is its own, too."""
NO_PANEL = re.compile(r"process_\w+")
STAT = """\
# pxname,svname,scur,slim,stot,bin,bout,ereq,econ,eresp,cli_abrt,srv_abrt,hrsp_1xx,hrsp_2xx,\
hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,req_tot,rtime,conn_tot,intercepted,ssl_failed_handshake,
grpc,FRONTEND,1,4096,1,100586,231,0,,,,,0,2,0,0,0,0,2,,1,1,0,
models,a,0,,1,100281,134,,0,0,0,0,0,1,0,0,0,0,1,12,,,,
models,BACKEND,0,410,1,100281,134,,0,0,0,0,0,1,0,0,0,0,1,12,,,,
"""
"""Of HAProxy 2.6, some of its columns; tests/contract/test_front_metrics.py asks a real one."""


class Front:
    """A front that answers as HAProxy does."""

    def __init__(self) -> None:
        self.api = self

    async def command(self, line: str) -> str:
        answers = {
            "show stat -1 7 -1": STAT,
            "show ssl cert": "# filename\n/dev/fd/7\n",
            "show ssl cert /dev/fd/7": "Serial: 01\nnotAfter: Dec 31 00:00:00 2029 GMT\n",
        }
        return answers[line]


@pytest.fixture
async def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scrape:
    """Scrape a daemon of which every metric has a sample."""
    world = World(tmp_path)
    world.server.lease_s = LEASE_S
    world.config = world.make_config("model", "broken")
    world.image()
    world.image("broken")
    monkeypatch.setattr(
        metrics,
        "front_families",
        lambda _front: front_families(cast("Any", Front())),
    )
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.readiness()[0])
        await daemon.unmount("broken")
        world.mapper.next_error = IntegrityError("a hash differs")
        daemon.volumes.named("broken").want(mounted=True)
        await daemon.until(state(daemon, VolumeState.FAILED, "broken"))
        world.server.errors["model"] = UnreachableError("no key server")
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        return Scrape.of(await metrics_text(completed(daemon)))


def completed(daemon: Any) -> Any:
    """Let the daemon show what takes a real kernel: a device, a model server that failed."""
    shown = daemon.status()
    for one in shown["volumes"]:
        one["bytes_read"] = 4096
    shown["serving"]["servers"] = [{"slot": "a", "ready": False}]
    shown["serving"]["error"] = {"code": "serve-exited"}
    shown["serving"]["certificate"] = {"error": {"code": "data"}}
    daemon.events.emit("serving.failed", code="serve-exited")
    return SimpleNamespace(
        status=lambda: shown,
        events=daemon.events,
        beats=daemon.beats,
        evidence=daemon.evidence,
        attester=daemon.attester,
        serving=daemon.serving,
    )


@pytest.fixture
async def key_server(tmp_path: Path) -> Scrape:
    """Scrape a key server that has released one key and denied another."""
    with opened_owner(tmp_path) as owner:
        tally, totals = Tally(), Totals()
        keyd = make_keyd(
            owner.directory,
            read_config(owner.directory),
            owner.store,
            on_records=tally.decided,
            tally=tally,
        )
        owner.add("m")
        tls = read_tls(owner.directory)
        with serving(keyd, tls, on_end=tally.ended) as address:
            await owner.fetch("m", "stranger", config=owner.config(address))
        totals.hear(1, tally.line())
        return Scrape.of(totals.text())


# --- what the files say -----------------------------------------------------------


class Selector:
    """A metric in an expression, and what its labels must match."""

    def __init__(self, node: promql.VectorSelector) -> None:
        self.name = node.name
        self.matchers = [
            (one.name, one.op, one.value) for one in node.matchers.matchers
        ]


class Expression:
    """An expression, taken apart by a parser of PromQL; Grafana's variables are filled in.

    `labels` are those that it groups or joins by.
    """

    def __init__(self, text: str, shown: str = "") -> None:
        self.text, self.shown = text, shown
        self.selectors: list[Selector] = []
        self.labels: set[str] = set()
        tree = promql.parse(text.replace("$__rate_interval", "5m"))
        promql.walk(tree, self._visit, None)

    def _visit(self, node: promql.Expr) -> bool:
        if isinstance(node, promql.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql.VectorSelector):
            self.selectors.append(Selector(node))
        elif isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            self.labels |= set(node.modifier.labels)
        elif isinstance(node, promql.BinaryExpr) and node.modifier is not None:
            matching = node.modifier.matching
            self.labels |= set(matching.labels) if matching else set()
        return True


def rules(name: str) -> list[dict[str, Any]]:
    content = yaml.safe_load((FILES / f"{name}.rules.yml").read_text("utf-8"))
    (group,) = content["groups"]
    assert set(content) == {"groups"}
    assert group["name"] == name
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels(name: str) -> list[dict[str, Any]]:
    content = json.loads((FILES / f"{name}.dashboard.json").read_text("utf-8"))
    found: list[dict[str, Any]] = content["panels"]
    return found


@functools.cache
def expressions(name: str) -> tuple[list[Expression], list[Expression]]:
    """All expressions of the rules, and of the dashboard."""
    alerts = [
        Expression(one["expr"], json.dumps(one["annotations"])) for one in rules(name)
    ]
    charts = [
        Expression(target["expr"], target["legendFormat"])
        for panel in panels(name)
        for target in panel.get("targets", ())
    ]
    return alerts, charts


def check(found: list[Expression], scrape: Scrape) -> None:
    """Every metric and every label exists; a label's value is one that it can have."""
    labels = scrape.labels()
    for one in found:
        there = set(TARGET_LABELS)
        for selector in one.selectors:
            if selector.name == "up":
                own = TARGET_LABELS
            else:
                assert selector.name in labels, (one.text, selector.name)
                own = labels[selector.name] | TARGET_LABELS
            there |= own
            for label, op, value in selector.matchers:
                assert label in own, (one.text, label)
                check_value(scrape, selector.name or "", label, value, op)
        assert one.labels <= there, one.text
        shown = re.findall(r"\{\{ *(?:\$labels\.)?([a-z_]+) *\}\}", one.shown)
        assert set(shown) <= there, (one.text, one.shown)


ERROR_CODES = {
    one.code
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if issubclass(one, errors.TdxdError)
}


def check_value(
    scrape: Scrape, name: str, label: str, value: str, op: promql.MatchOp
) -> None:
    if label in TARGET_LABELS:
        assert value in {"tdxd", "tdx-keyd", "$instance"}
        return
    known = ERROR_CODES if name.endswith("error") else set(scrape.labelled(name, label))
    wanted = value.split("|") if op == promql.MatchOp.Re else [value]
    for one in wanted:
        assert one in known, (name, label, one)


def unused(found: list[Expression], scrape: Scrape) -> set[str]:
    """Return the families that no expression names."""
    named = {selector.name for one in found for selector in one.selectors}
    return {
        family
        for family in scrape.kinds
        if not NO_PANEL.fullmatch(family)
        and not named & {family, f"{family}_bucket", f"{family}_count"}
    }


async def test_rules_and_dashboard_of_guests_use_what_a_daemon_shows(guest) -> None:
    alerts, charts = expressions("tdxd")
    check([*alerts, *charts], guest)
    assert unused(charts, guest) == set()


async def test_rules_and_dashboard_of_key_servers_use_what_one_shows(
    key_server,
) -> None:
    alerts, charts = expressions("tdx-keyd")
    check([*alerts, *charts], key_server)
    assert unused(charts, key_server) == set()
    assert key_server.value("tdx_keyd_releases_total") == 1
    denials = key_server.labelled("tdx_keyd_denials_total", "reason")
    assert {name for name, count in denials.items() if count} == {"unknown-volume"}
    assert set(denials) == REASONS
    calls = "tdx_keyd_calls_total"
    assert key_server.value(calls, method="challenges", code="OK") == 1
    assert key_server.value(calls, method="releases", code="OK") == 1


async def test_names_and_kinds_keep_to_the_conventions(guest, key_server) -> None:
    """Base units, `_total` for counters alone; no label that a stranger could fill."""
    check_conventions(guest, "tdxd_")
    check_conventions(key_server, "tdx_keyd_")


def check_conventions(scrape: Scrape, prefix: str) -> None:
    sampled = {
        re.sub(r"_(bucket|sum|count)$", "", one)
        if scrape.kinds.get(one) is None
        else one
        for one, _ in scrape.samples
    }
    assert set(scrape.kinds) == sampled  # of every family a sample was seen
    for family, kind in scrape.kinds.items():
        assert family.startswith((prefix, "process_"))
        assert scrape.helps[family].endswith(".")
        assert family.endswith("_total") == (kind == "counter")
        assert not re.search(r"_(ms|us|minutes|hours|kib|mib|percent|s)(_|$)", family)
        if kind == "histogram":
            assert family.endswith("_seconds")
    known = {"volume", "state", "code", "version", "mapper", "trust", "kind", "le"}
    known |= {
        "integrity",
        "frontend",
        "backend",
        "slot",
        "reason",
        "method",
        "root",
        "result",
    }
    known |= {"fmspc", "ca"}
    assert {one for labels in scrape.labels().values() for one in labels} <= known


async def test_the_states_are_all_there(guest) -> None:
    states = guest.labelled("tdxd_volume_state", "state")
    assert set(states) == {one.value for one in VolumeState}
    serving_states = guest.labelled("tdxd_serving_state", "state")
    assert set(serving_states) == {"off", *(one.value for one in ServingState)}


@pytest.mark.parametrize("name", ["tdxd", "tdx-keyd"])
def test_rules_and_dashboards_are_whole(name) -> None:
    for one in rules(name):
        assert set(one) - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert set(one["labels"]) == {"severity"}
        assert one["labels"]["severity"] in {"critical", "warning"}
        assert set(one["annotations"]) == {"summary"}
        assert re.fullmatch(r"\d+[mh]", one.get("for", "1m"))
    found = panels(name)
    assert len({one["id"] for one in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for one in found:
        place = one["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, one["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


async def test_the_document_names_each_metric_and_each_alert(guest, key_server) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
    named = set(re.findall(r"`((?:tdxd|tdx_keyd|process)_[a-z_]+)", text))
    exported = {*guest.kinds, *key_server.kinds}
    assert {one for one in exported if not NO_PANEL.fullmatch(one)} <= named
    assert named <= exported
    alerts = {one["alert"] for name in ("tdxd", "tdx-keyd") for one in rules(name)}
    assert set(re.findall(r"`(Tdx[A-Za-z]+)`", text)) == alerts


async def test_the_check_sees_what_does_not_exist(guest) -> None:
    for expression, shown in (
        ("tdxd_volume_stat", ""),
        ('tdxd_volume_state{status="mounted"}', ""),
        ('tdxd_volume_state{state="mountd"}', ""),
        ('tdxd_volume_error{code=~"key-denied|key-refused"}', ""),
        ("sum by (volum) (tdxd_volume_state)", ""),
        ("tdxd_volume_state and on (volume_id) tdxd_volume_wanted", ""),
        ("rate(tdxd_volume_read_bytes_totl[5m])", ""),
        ("tdxd_ready", "{{ $labels.volume }}"),
    ):
        with pytest.raises(AssertionError):
            check([Expression(expression, shown)], guest)


def test_the_check_sees_wrong_syntax() -> None:
    with pytest.raises(ValueError, match="expected type"):
        Expression("rate(tdxd_ready)")

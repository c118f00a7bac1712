"""`tdx-infer bench`: what load to make, and what is shown of it while it lasts and after."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from tdxd.cli.infer_live import live_view
from tdxd.cli.infer_options import (
    add_common,
    add_inputs,
    count,
    endpoint_of,
    given_inputs,
    model_of,
)
from tdxd.errors import EX_OK, EX_TEMPFAIL, HostError, TdxdError, UsageError

if TYPE_CHECKING:
    from tdxd.user.bench import Query, Report
    from tdxd.user.endpoint import Endpoint
    from tdxd.user.infer import Model
    from tdxd.user.inputs import Array
    from tdxd.user.load import Load
    from tdxd.user.signature import Shape

__all__ = ["add_bench", "with_verb"]

_LOOPS = 200
# What resnet_client_grpc.py asks, always, and its flags.
_REFERENCE_MODEL = "resnet50-v15-fp32"
_REFERENCE_FLAGS = "url|img|crt|batch|cnum|loop|ca|key"


def with_verb(argv: Sequence[str]) -> list[str]:
    """Return the command line of resnet_client_grpc.py as one of `bench`; others as they are.

    It has no verb, and one dash where two are usual.
    """
    first = argv[0] if argv else ""
    if re.match(rf"--?({_REFERENCE_FLAGS})(=|$)", first):
        argv = ["bench", *argv]
    elif first != "bench":
        return list(argv)
    return [re.sub(rf"^-(?=({_REFERENCE_FLAGS})(=|$))", "--", one) for one in argv]


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, and the verb itself."""
    add_common(parser, address="?")
    add_inputs(parser)
    add = parser.add_argument
    text = "sizes of an input of random values, where the model leaves them open"
    add("--shape", metavar="[NAME=]N,N,…", action="append", default=[], help=text)
    text = "rows per request; default: as given; several: one run for each"
    add("--batch", type=_counts, metavar="B,…", help=text)
    text = "clients, each with a connection (%(default)s); several: one run for each"
    add("--cnum", type=_counts, default="16", metavar="N,…", help=text)
    text = f"requests of each client ({_LOOPS}, without --duration); 0: no end"
    add("--loop", type=_count_or_0, metavar="N", help=text)
    add("--duration", type=float, metavar="S", help="send for so many seconds")
    text = "requests per second in all, whatever became of those before"
    add("--rate", type=_rates, metavar="R,…", help=text)
    text = "at what times --rate's requests are due (%(default)s)"
    add("--arrivals", choices=("even", "poisson"), default="even", help=text)
    text = "processes that share the clients (%(default)s)"
    add("--processes", type=count, default=1, metavar="N", help=text)
    add(
        "--warm-up",
        type=count,
        default=5,
        metavar="N",
        help="unmeasured requests of each client before (%(default)s)",
    )
    add("--quiet", action="store_true", help="no line for each query")
    add("--plot", metavar="FILE.html", help="draw the latencies")
    reference = parser.add_argument_group("as resnet_client_grpc.py has them")
    add = reference.add_argument
    text = f"ADDRESS; the model is {_REFERENCE_MODEL}, if --model is not given"
    add("--url", metavar="ADDRESS", help=text)
    add("--crt", metavar="FILE", help="--ca; with --key it is --cert")
    parser.set_defaults(verb=_bench)


def _counts(text: str) -> list[int]:
    return [count(one) for one in text.split(",")]


def _rates(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


def _count_or_0(text: str) -> int:
    return 0 if text == "0" else count(text)


# --- what to do ---------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    from tdxd.user.infer import encode_request

    _as_reference(arguments)
    endpoint, model = endpoint_of(arguments), model_of(arguments)
    plan = list(_loads(arguments))
    made = _Inputs(arguments, endpoint, model)
    requests: dict[int, tuple[int, bytes]] = {}
    for batch in {load.batch for load in plan}:
        inputs, rows = made.rows(batch or None)
        requests[batch] = rows, encode_request(model, inputs)
    runs = []
    for load in plan:
        rows, request = requests[load.batch]
        runs.append((dataclasses.replace(load, batch=rows), request))
    with _Interrupt() as interrupt:
        return _Bench(arguments, endpoint, interrupt).run(runs)


def _as_reference(arguments: argparse.Namespace) -> None:
    """Give the reference's flags their meaning here."""
    for theirs, ours in (
        ("url", "address"),
        ("crt", "cert" if arguments.key else "ca"),
    ):
        value = getattr(arguments, theirs)
        if value is None:
            continue
        if getattr(arguments, ours) is not None:
            shown = "ADDRESS" if ours == "address" else f"--{ours}"
            raise UsageError(f"--{theirs} and {shown} exclude each other")
        setattr(arguments, ours, value)
    if arguments.url is not None and arguments.model is None:
        arguments.model = _REFERENCE_MODEL


def _loads(arguments: argparse.Namespace) -> Iterator[Load]:
    """Yield the load of each run; batch 0 is what the inputs have.

    Raises: UsageError.
    """
    from tdxd.user.load import Load

    loops = arguments.loop
    if loops is None:
        loops = _LOOPS if arguments.duration is None else 0
    runs = list(
        itertools.product(
            arguments.cnum, arguments.batch or [0], arguments.rate or [None]
        )
    )
    for clients, batch, rate in runs:
        load = Load(
            clients=clients,
            loops=loops or None,
            batch=batch,
            warm_up=arguments.warm_up,
            processes=arguments.processes,
            rate=rate,
            arrivals=arguments.arrivals,
            duration_s=arguments.duration,
        )
        if load.endless and len(runs) > 1:
            raise UsageError("--loop 0 with several runs: the first would not end")
        yield load


class _Inputs:
    """The inputs as given, or random ones as the model's metadata has them."""

    def __init__(
        self, arguments: argparse.Namespace, endpoint: Endpoint, model: Model
    ) -> None:
        from tdxd.user.endpoint import open_channel
        from tdxd.user.infer import fetch_signature, resolve_inputs
        from tdxd.user.signature import input_specs

        given = given_inputs(arguments)
        if given and arguments.shape:
            raise UsageError("--shape is for inputs that are not given")
        self._given: dict[str, Array] = {}
        with open_channel(endpoint) as channel:
            if given:
                self._given = resolve_inputs(channel, endpoint, model, given)
                return
            self._specs = input_specs(fetch_signature(channel, endpoint, model))
        self._shapes = _shapes(arguments.shape, list(self._specs))

    def rows(self, batch: int | None) -> tuple[dict[str, Array], int]:
        """Return arrays of `batch` rows, and how many rows they have."""
        from tdxd.user.inputs import as_batch
        from tdxd.user.signature import random_array

        if not self._given:
            made = {
                name: random_array(spec, rows=batch or 1, shape=self._shapes.get(name))
                for name, spec in self._specs.items()
            }
        elif batch is not None:
            made = {name: as_batch(one, batch) for name, one in self._given.items()}
        else:
            made = self._given
        sizes = {len(array) for array in made.values() if array.ndim}
        return made, batch or (sizes.pop() if len(sizes) == 1 else 1)


def _shapes(arguments: Sequence[str], names: Sequence[str]) -> dict[str, Shape]:
    """Parse `[NAME=]N,N,…`; a first size of ? is the batch."""
    made: dict[str, Shape] = {}
    for argument in arguments:
        name, separator, text = argument.rpartition("=")
        if not separator and len(names) != 1:
            known = ", ".join(names)
            hint = f"the model has the inputs {known}: --shape NAME={text}"
            raise UsageError(f"--shape {argument}: of which input", hint=hint)
        name = name if separator else names[0]
        if name not in names:
            hint = f"the model has: {', '.join(names)}"
            raise UsageError(f"--shape: no input {name!r}", hint=hint)
        sizes = text.split(",") if text else []
        if not all(one.isdecimal() or one == "?" for one in sizes):
            raise UsageError(f"--shape {argument}: sizes are whole numbers")
        made[name] = tuple(None if one == "?" else int(one) for one in sizes)
    return made


# --- the runs -----------------------------------------------------------------


class _Interrupt:
    """Ctrl-C and SIGTERM end a run early, with its figures; a second one ends all at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def noted(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal)


class _Bench:
    """Runs, one after the other, and what is printed of them."""

    def __init__(
        self, arguments: argparse.Namespace, endpoint: Endpoint, interrupt: _Interrupt
    ) -> None:
        self._arguments, self._endpoint = arguments, endpoint
        self._interrupt = interrupt
        self._reports: list[Report] = []
        self._queries = not (arguments.quiet or arguments.json)

    def run(self, runs: Sequence[tuple[Load, bytes]]) -> int:
        """Do all runs, show the figures, return the exit code."""
        try:
            for load, request in runs:
                self._one(load, request)
                if self._interrupt.noted():
                    break
        except (TdxdError, KeyboardInterrupt):
            if self._reports:  # what was measured before is not lost
                self._show(len(runs))
            if self._interrupt.noted():
                return 128 + self._interrupt.signal
            raise
        self._show(len(runs))
        if self._interrupt.noted():
            return 128 + self._interrupt.signal
        return EX_TEMPFAIL if any(one.errors for one in self._reports) else EX_OK

    def _one(self, load: Load, request: bytes) -> None:
        from tdxd.user.bench import run_bench

        lines = self._queries and sys.stdout.isatty()
        with live_view(load, wanted=not lines) as update:
            report = run_bench(
                self._endpoint,
                load,
                request,
                on_query=self._each(load, update),
                on_warm=lambda elapsed_s: self._warm(load, elapsed_s),
                on_answer=self._answer,
                stopped=self._interrupt.noted,
            )
        self._reports.append(report)
        if not self._arguments.json:
            print("\n".join(report.lines()))

    def _each(
        self, load: Load, update: Callable[[Query], None]
    ) -> Callable[[Query], None]:
        if not self._queries:
            return update
        channel = self._endpoint.channel_kind

        def show(query: Query) -> None:
            line = query.line(load.batch, channel=channel, endless=load.endless)
            failed = "" if query.code == "OK" else f", failed: {query.code}"
            print(line + failed, flush=load.endless)
            update(query)

        return show

    def _warm(self, load: Load, elapsed_s: float) -> None:
        if not self._arguments.json:
            requests = load.clients * load.warm_up
            print(f"warm-up: requests {requests}, time(s) {elapsed_s:.3f}")

    def _answer(self, answer: bytes) -> None:
        """Print an answer as the reference prints its first, if it was called as that is."""
        if self._arguments.url is None or not self._queries:
            return
        from google.protobuf.json_format import MessageToDict

        from tdxd.host import tf_messages

        print(MessageToDict(tf_messages.predict().PredictResponse.FromString(answer)))

    def _show(self, planned: int) -> None:
        """Print and draw what is about all runs."""
        reports = self._reports
        if self._arguments.json:
            made: Any = [report.as_json() for report in reports]
            print(json.dumps({"runs": made} if planned > 1 else made[0]))
        elif planned > 1:
            print("\n".join(_table(reports)))
        if self._arguments.plot:
            self._plot(self._arguments.plot)

    def _plot(self, path: str) -> None:
        from tdxd.user.plot import render

        title = f"tdx-infer bench: {self._arguments.model} at {self._endpoint.address}"
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(render(title, self._reports))
        except OSError as exc:
            raise HostError.of("write", path, exc) from exc


def _table(reports: Sequence[Report]) -> list[str]:
    """Return one line for each run, in columns."""
    rows = [("cnum", "batch", "rate", "req/s", "rows/s", "p50 ms", "p99 ms", "errors")]
    for report in reports:
        load, spread = report.load, report.spread_ms()
        rows.append(
            (
                str(load.clients),
                str(load.batch),
                "-" if load.rate is None else f"{load.rate:g}",
                f"{report.requests_per_s:.1f}",
                f"{report.rows_per_s:.1f}",
                f"{spread['p50']:.1f}" if spread else "-",
                f"{spread['p99']:.1f}" if spread else "-",
                str(sum(report.errors.values())),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]

"""Cells and children on the real kernel: what they see, and that nothing of them stays."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from tdxd.errors import HostError
from tdxd.host import mount, netns, proc
from tdxd.host.ports import Child, ChildSpec, HandedChild

pytestmark = pytest.mark.root


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runtime directory that `nobody` can reach, with two volumes mounted in it."""
    directory = Path("/run") / f"tdxd-test-{os.getpid()}"
    for name in ("one", "two"):
        point = directory / "volumes" / name
        point.mkdir(parents=True)
        mount.mount_tmpfs(str(point), size_bytes=1024 * 1024)
        for part in ("models", "tls"):
            (point / part).mkdir()
            (point / part / "file").write_text(f"{name} {part}")
    (directory / "serve").mkdir()
    yield directory
    for name in ("one", "two"):
        mount.detach(str(directory / "volumes" / name))
    os.system(f"rm -rf {directory}")


@pytest.fixture
def children() -> Iterator[proc.CellChildren]:
    made = proc.CellChildren()
    yield made
    made.close()


def argv(code: str) -> tuple[str, ...]:
    return ("/usr/bin/python3", "-I", "-c", code)


async def output(
    children: proc.CellChildren, runtime: Path, code: str, **more: object
) -> tuple[int, str]:
    cell = children.make_cell(
        hide=str(runtime),
        binds=[
            (str(runtime / "volumes/one/models"), str(runtime / "models/one")),
            (str(runtime / "serve"), str(runtime / "serve")),
        ],
    )
    spec = ChildSpec(name="test", argv=argv(code), user="nobody", cell=cell, **more)  # type: ignore[arg-type]
    child = children.spawn(spec)
    lines = []
    with trio.fail_after(20):
        async for line in child.lines():
            lines.append(line)
        status = await child.wait()
    cell.close()
    return status, "\n".join(lines)


async def test_a_child_sees_its_models_and_no_volume(children, runtime) -> None:
    code = f"""
import os
print(sorted(os.listdir({str(runtime)!r})))
print(open({str(runtime / "models/one/file")!r}).read())
for line in open("/proc/self/mountinfo"):
    assert "volumes" not in line.split()[4], line
"""
    status, text = await output(children, runtime, code)
    assert (status, text.splitlines()) == (0, ["['models', 'serve']", "one models"])


async def test_a_child_has_no_network_but_loopback(children, runtime) -> None:
    code = """
import socket
print([name for _, name in socket.if_nameindex()])
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as exc:
    print(exc.errno)
"""
    status, text = await output(children, runtime, code)
    assert (status, text.splitlines()) == (0, ["['lo']", "101"])


async def test_a_child_has_no_rights(children, runtime) -> None:
    code = """
for line in open("/proc/self/status"):
    if line.startswith(("Uid", "CapEff", "CapBnd", "CapPrm", "NoNewPrivs", "Groups")):
        print(line.split(":")[0], *line.split()[1:])
"""
    status, text = await output(children, runtime, code)
    assert status == 0
    rows = dict(line.partition(" ")[::2] for line in text.splitlines())
    assert rows["Uid"] == "65534 65534 65534 65534"
    assert rows["Groups"] == ""
    assert (
        int(rows["CapEff"], 16)
        == int(rows["CapBnd"], 16)
        == int(rows["CapPrm"], 16)
        == 0
    )
    assert rows["NoNewPrivs"] == "1"


async def test_a_childs_environment_is_an_allow_list(
    children, runtime, monkeypatch
) -> None:
    monkeypatch.setenv("TDXD_CANARY", "leak")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    code = "import os; print(sorted(set(os.environ) - {'LANG', 'TZ', 'LC_CTYPE'}))"
    _status, text = await output(children, runtime, code, env={"EXTRA": "1"})
    assert text == "['EXTRA', 'HOME', 'PATH']"


async def test_a_volume_can_be_unmounted_while_a_child_of_another_runs(
    children, runtime
) -> None:
    cell = children.make_cell(
        hide=str(runtime),
        binds=[(str(runtime / "volumes/one/models"), str(runtime / "models/one"))],
    )
    child = children.spawn(
        ChildSpec(name="test", argv=("sleep", "60"), user="nobody", cell=cell)
    )
    mounts = f"/proc/{child.pid}/mountinfo"
    with trio.fail_after(10):
        while (
            b"sleep"
            not in Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[0]
        ):
            await trio.sleep(0.01)
    assert not [point for point in mount.mount_points(mounts) if "volumes" in point]
    await child.stop(5)
    cell.close()


async def test_stop_ends_what_ignores_the_signal_and_its_children(
    children, runtime
) -> None:
    cell = children.make_cell(hide=str(runtime), binds=[])
    code = (
        "import signal,subprocess,time; signal.signal(15, signal.SIG_IGN); "
        "p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    child = children.spawn(
        ChildSpec(name="test", argv=argv(code), user="nobody", cell=cell)
    )
    grandchild = 0
    async with aclosing(child.lines()) as lines:
        async for line in lines:
            grandchild = int(line)
            break
    assert await child.stop(0.2) == -9
    # Its parent is gone: who adopted it reaps it, at once or never.
    with trio.fail_after(5), suppress(FileNotFoundError, ProcessLookupError):
        while "Z" not in Path(f"/proc/{grandchild}/stat").read_text().split(")")[1]:
            await trio.sleep(0.02)
    cell.close()


async def test_a_child_dies_with_the_daemon(tmp_path) -> None:
    root = Path(netns.__file__).parents[2]
    code = f"""
import sys, os, trio
sys.path.insert(0, {str(root)!r})
from tdxd.host import proc
from tdxd.host.ports import Child, ChildSpec, HandedChild
async def main():
    children = proc.CellChildren()
    cell = children.make_cell(hide={str(tmp_path)!r}, binds=[])
    child = children.spawn(ChildSpec(name="t", argv=("sleep", "60"), user="nobody", cell=cell))
    await trio.sleep(0.3)
    print(child.pid, flush=True)
    await trio.sleep_forever()
trio.run(main)
"""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            lambda task_status: trio.run_process(
                [sys.executable, "-I", "-c", code],
                stdout=-1,
                check=False,
                capture_stdout=False,
                task_status=task_status,
            )
        )
        pid = int(await process.stdout.receive_some())
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")
        process.kill()
        with trio.fail_after(5):
            while Path(f"/proc/{pid}/cmdline").exists():
                await trio.sleep(0.02)
        await process.stdout.aclose()


async def test_an_unknown_user_is_named(children, runtime) -> None:
    cell = children.make_cell(hide=str(runtime), binds=[])
    with pytest.raises(HostError, match="nosuchuser") as caught:
        children.spawn(
            ChildSpec(name="t", argv=("true",), user="nosuchuser", cell=cell)
        )
    assert "serving.user" in caught.value.hint


async def test_root_is_refused_as_serving_user(children, runtime) -> None:
    cell = children.make_cell(hide=str(runtime), binds=[])
    with pytest.raises(HostError, match="run a model server as root"):
        children.spawn(ChildSpec(name="t", argv=("true",), user="root", cell=cell))


def test_cells_leave_no_descriptor_and_no_mount(children, runtime) -> None:
    children.make_cell(hide=str(runtime), binds=[]).close()
    before = (len(os.listdir("/proc/self/fd")), mount.mount_points())
    for _ in range(3):
        children.make_cell(hide=str(runtime), binds=[]).close()
    assert (len(os.listdir("/proc/self/fd")), mount.mount_points()) == before


async def test_several_tasks_may_wait_while_another_stops_it(children, runtime) -> None:
    cell = children.make_cell(hide=str(runtime), binds=[])
    child = children.spawn(
        ChildSpec(name="test", argv=("sleep", "60"), user="nobody", cell=cell)
    )
    statuses: list[int] = []

    async def watch() -> None:
        statuses.append(await child.wait())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            nursery.start_soon(watch)
            await trio.sleep(0.2)
            statuses.append(await child.stop(5))
    async for _line in child.lines():
        pass
    cell.close()
    assert statuses == [-15] * 3


# --- over an exec: the next program is another object in the same process here ----------


def spawned(
    children: proc.CellChildren, runtime: Path, *command: str
) -> tuple[proc.Process, netns.NamespaceCell]:
    cell = children.make_cell(hide=str(runtime), binds=[])
    spec = ChildSpec(name="test", argv=command, user="nobody", cell=cell)
    child = children.spawn(spec)
    assert isinstance(child, proc.Process)
    assert isinstance(cell, netns.NamespaceCell)
    return child, cell


def handed_over(
    children: proc.CellChildren, child: proc.Process, cell: netns.NamespaceCell
) -> HandedChild:
    """What is handed over, with descriptors of its own, as if these were another program's."""
    handed = children.hand_over(child, cell)
    copied = dataclasses.replace(
        handed,
        pid_fd=os.dup(handed.pid_fd),
        output_fd=os.dup(handed.output_fd),
        mount_fd=os.dup(handed.mount_fd),
        net_fd=os.dup(handed.net_fd),
    )
    cell.close()
    return copied


@pytest.fixture
def successors() -> Iterator[proc.CellChildren]:
    """The next program's children."""
    made = proc.CellChildren()
    yield made
    made.close()


async def collect(child: Child, lines: list[str]) -> None:
    lines += [line async for line in child.lines()]


async def test_an_adopted_child_is_as_good_as_an_own(
    children, runtime, successors
) -> None:
    """Its output goes on in the middle of a line, it can be stopped, its status is told."""
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7));"
        "print('half', end='', flush=True); time.sleep(1);"
        "print(' a line', flush=True); time.sleep(60)"
    )
    child, cell = spawned(children, runtime, *argv(code))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, child, [])
            while children.hand_over(child, cell).unread != b"half":
                await trio.sleep(0.01)
            handed = handed_over(children, child, cell)
            nursery.cancel_scope.cancel()
        adopted, its_cell = successors.adopt(handed)
        lines: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, adopted, lines)
            await trio.sleep(1.2)
            assert await adopted.stop(5) == 7
    assert lines == ["half a line"]
    assert (adopted.pid, await adopted.wait()) == (child.pid, 7)
    its_cell.close()


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.abort()", -6)])
async def test_one_that_ended_meanwhile_tells_its_status(
    children, runtime, successors, end: str, status: int
) -> None:
    code = f"import os, sys; print('last words', flush=True); {end}"
    child, cell = spawned(children, runtime, *argv(code))
    with trio.fail_after(20):
        pid_fd = os.dup(children.hand_over(child, cell).pid_fd)
        await trio.lowlevel.wait_readable(pid_fd)
        os.close(pid_fd)
        adopted, its_cell = successors.adopt(handed_over(children, child, cell))
        assert await adopted.wait() == status
        assert [line async for line in adopted.lines()] == ["last words"]
    its_cell.close()


async def test_new_cells_share_the_network_that_was_handed_over(
    children, runtime, successors
) -> None:
    child, cell = spawned(children, runtime, "sleep", "60")
    adopted, its_cell = successors.adopt(handed_over(children, child, cell))
    other, other_cell = spawned(successors, runtime, "sleep", "60")
    with trio.fail_after(10):
        while os.readlink(f"/proc/{other.pid}/ns/net") != os.readlink(
            f"/proc/{adopted.pid}/ns/net"
        ):
            await trio.sleep(0.01)
    for one in (adopted, other):
        await one.stop(5)
        async for _line in one.lines():
            pass
    its_cell.close()
    other_cell.close()


@pytest.mark.parametrize(
    "wrong", ["a stranger", "no pidfd", "another pid", "no namespace", "closed"]
)
async def test_what_is_no_child_of_ours_is_refused(
    children, runtime, successors, wrong: str
) -> None:
    """Its descriptors are closed, nothing is signalled."""
    child, cell = spawned(children, runtime, "sleep", "60")
    handed = handed_over(children, child, cell)
    names = ("pid_fd", "output_fd", "mount_fd")
    match wrong:
        case "a stranger":
            stranger = os.pidfd_open(os.getppid())
            os.dup2(stranger, handed.pid_fd)
            os.close(stranger)
        case "no pidfd":
            os.dup2(0, handed.pid_fd)
        case "another pid":
            handed = dataclasses.replace(handed, pid=handed.pid + 1)
        case "no namespace":
            os.dup2(0, handed.mount_fd)
        case "closed":
            for name in names:
                os.close(getattr(handed, name))
    with pytest.raises(HostError, match="adopt test"):
        successors.adopt(handed)
    for name in names:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(getattr(handed, name))
    assert Path(f"/proc/{child.pid}").exists()
    assert await child.stop(5) == -15
    async for _line in child.lines():
        pass


def test_all_children_can_be_ended(tmp_path: Path) -> None:
    """With all of their sessions; those of a program whose state nobody knows."""
    root = Path(netns.__file__).parents[2]
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(root)!r})
from tdxd.host import proc
session = "sleep 60 & sleep 60 & wait"
for _ in range(3):
    subprocess.Popen(["sh", "-c", session], start_new_session=True)
subprocess.Popen(["true"])
one = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True,
                       stdout=subprocess.PIPE)
grandchild = int(one.stdout.readline())
proc.end_all_children()
print(grandchild, *[line for task in [sys.argv[0]] for line in
      open("/proc/thread-self/children").read().split()])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    (grandchild,) = done.stdout.split()  # no child is left
    assert not Path(f"/proc/{grandchild}/exe").exists()

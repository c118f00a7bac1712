"""Cells and children on the real kernel: what they see, and that nothing of them stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from tdxd.errors import HostError
from tdxd.host import mount, netns, proc
from tdxd.host.ports import ChildSpec

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
    with trio.fail_after(5):
        while Path(f"/proc/{grandchild}/cmdline").exists():
            if "Z" in Path(f"/proc/{grandchild}/stat").read_text().split(")")[1]:
                break
            await trio.sleep(0.02)
    cell.close()


async def test_a_child_dies_with_the_daemon(tmp_path) -> None:
    root = Path(netns.__file__).parents[2]
    code = f"""
import sys, os, trio
sys.path.insert(0, {str(root)!r})
from tdxd.host import proc
from tdxd.host.ports import ChildSpec
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

"""The daemon's program is replaced in place: everything real, and nothing that it runs notices."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdxd.core import wire
from tdxd.guest.handover import FORMAT, READABLE, State, decode_state
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, predict
from tests.system.test_service import Manager
from tests.system.users import ANSWER, INPUT, Users
from tests.system.world import (
    BIN,
    Daemon,
    World,
    free_port,
    our_loops,
    program,
    toml,
    wait_for,
)

pytestmark = [pytest.mark.root, pytest.mark.slow]

RUN = Path("/run") / f"tdxd-system-{os.getpid()}"


def serving(port: int) -> dict[str, Any]:
    return {"listen": f"127.0.0.1:{port}", "user": "nobody", "drain_timeout_s": 1}


def parts(daemon: Daemon) -> dict[str, Any]:
    """What must be the same before and after."""
    shown = daemon.status()
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    info = Path(f"/proc/{pid}/mountinfo").read_text()
    return {
        "pid": shown["pid"],
        "since": shown["since"],
        "children": sorted(children),
        "front": shown["serving"]["front_pid"],
        "servers": [(one["slot"], one["pid"]) for one in shown["serving"]["servers"]],
        "serving": (shown["serving"]["state"], shown["serving"]["since"]),
        "volumes": [
            (one["id"], one["since"], one["device"]) for one in shown["volumes"]
        ],
        "mounts": [line for line in info.splitlines() if str(RUN) in line],
        "namespace": os.readlink(f"/proc/{pid}/ns/mnt"),
        "loops": our_loops(),
        "command": Path(f"/proc/{pid}/cmdline").read_bytes(),
    }


def descriptors(pid: int) -> list[str]:
    """Kinds of the open descriptors of a process, without their numbers."""
    kinds = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kinds.append(re.sub(r"\d+", "N", os.readlink(path)))
    return sorted(kinds)


def events(daemon: Daemon) -> list[dict[str, Any]]:
    lines = daemon.ctl("events", "--json", "--all").stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_nothing_that_runs_notices(world: World) -> None:
    port, health = free_port(), free_port()
    listen = {"listen": f"127.0.0.1:{health}"}
    with (
        world.key_server(),
        world.daemon(serving=serving(port), health=listen) as daemon,
    ):
        assert daemon.ctl("wait", "--timeout", "150").returncode == 0
        ca = world.directory / "ca.pem"
        with Users(ca, port=port, health=health, name="localhost") as users:
            users.more()
            before = parts(daemon)
            took_s = []
            for number in range(1, 6):
                started_s = time.monotonic()
                shown = daemon.reexec()
                took_s.append(time.monotonic() - started_s)
                assert shown["pid"] == daemon.process.pid
                assert daemon.status()["reexecs"] == number
                assert parts(daemon) == before
                users.more()
        print(f"tdxctl reexec took {[round(one, 2) for one in took_s]} s")
        print(f"meanwhile answered: {users.answers}")
        assert users.failures == []
        assert daemon.status()["ready"]
        check_events(daemon)
        check_what_is_open(daemon)
        check_that_it_still_works(world, daemon, port)


def check_events(daemon: Daemon) -> None:
    """They go on where they were."""
    heard = events(daemon)
    numbers = [one["seq"] for one in heard]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    names = [one["event"] for one in heard]
    assert names.count("daemon.reexecuted") == 5
    assert names.count("volume.mounted") == names.count("serving.ready") == 1
    assert not [name for name in names if "failed" in name or "not_adopted" in name]


def check_what_is_open(daemon: Daemon) -> None:
    """Re-executing gathers no descriptors, and a child that starts later inherits none."""
    shown = daemon.status()["serving"]
    before = descriptors(daemon.process.pid)
    for _ in range(3):
        daemon.reexec()
    assert descriptors(daemon.process.pid) == before
    (old,) = shown["servers"]
    os.kill(old["pid"], signal.SIGKILL)
    wait_for(lambda: daemon.status()["serving"]["restarts"] == 1, "the end is noticed")
    (new,) = daemon.until_serving("ready")["servers"]
    for pid in (new["pid"], shown["front_pid"]):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"TDXD_HANDOVER" not in environment
        assert Path(f"/proc/{pid}/stat").read_text().split()[3] == str(
            daemon.process.pid
        )
        open_ = descriptors(pid)
        assert not [one for one in open_ if "handover" in one or "pidfd" in one], open_
        mine = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        listener = os.readlink(f"/proc/{daemon.process.pid}/fd/{control_fd(daemon)}")
        assert listener not in mine


def control_fd(daemon: Daemon) -> int:
    """The descriptor of the daemon's control socket."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        if line.endswith(str(daemon.socket_path)) and line.split()[3] == "00010000":
            inode = line.split()[6]
    for path in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        if os.readlink(path) == f"socket:[{inode}]":
            return int(path.name)
    raise AssertionError("no control socket")


def check_that_it_still_works(world: World, daemon: Daemon, port: int) -> None:
    """What was taken over can be used, changed, closed and opened anew."""
    gone = daemon.ctl("unmount", "m")
    assert gone.returncode == 0, gone.stderr
    assert our_loops() == []
    daemon.reexec()
    assert daemon.volume()["state"] == "absent"  # what was set by hand is kept
    assert daemon.ctl("mount", "m").returncode == 0
    daemon.until_serving("ready")
    ca = (world.directory / "ca.pem").read_bytes()
    endpoint = Endpoint(address=f"localhost:{port}", ca_pem=ca, timeout_s=20)
    answer = predict(endpoint, Model(name="line"), {"x": INPUT})
    assert answer.outputs["y"].tolist() == ANSWER


# --- another program --------------------------------------------------------------


class Launcher:
    """A program that is tdxd, with lines of Python that it runs before it is.

    `check` runs where the program is tried out, `start` where it takes over: STATE is then the
    number of the descriptor with the state.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write()

    def write(self, *, check: str = "", start: str = "", before: str = "") -> None:
        def indented(text: str) -> str:
            return "".join(f"    {line}\n" for line in ["pass", *text.splitlines()])

        self.path.write_text(
            f"#!{BIN / 'python'}\n"
            "import os, signal, sys\n"
            'if "--check-handover" in sys.argv:\n'
            + indented(check)
            + 'elif "TDXD_HANDOVER" in os.environ:\n'
            + '    STATE = int(os.environ["TDXD_HANDOVER"].split(":")[1])\n'
            + indented(start)
            + before
            + "\nfrom tdxd.cli.tdxd import main\nsys.exit(main())\n"
        )
        self.path.chmod(0o755)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path / "tdxd")


def test_the_new_program_is_the_one_on_disk(world: World, launcher: Launcher) -> None:
    with world.daemon(program=launcher.path, volume=[]) as daemon:
        version = daemon.status()["version"]
        launcher.write(before="import tdxd; tdxd.__version__ = '99.1'")
        done = daemon.ctl("reexec")
        pid = daemon.process.pid
        assert done.stdout == f"re-executed: version {version} -> 99.1, pid {pid}\n"
        assert daemon.status()["version"] == "99.1"
        assert daemon.ctl("version").stdout == "tdxd 99.1\n"


def refused(daemon: Daemon, code: int) -> str:
    """A re-exec that is refused, and the daemon goes on under its first program."""
    done = daemon.ctl("reexec")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert daemon.status()["reexecs"] == 0
    return done.stderr


def test_what_would_not_start_is_refused(world: World, launcher: Launcher) -> None:
    """The daemon goes on as it was, mounted, and takes the next program that is right."""
    path = world.directory / "tdxd.toml"
    with world.key_server(), world.daemon(program=launcher.path) as daemon:
        mounted = daemon.until_volume("mounted")

        good = path.read_text()
        path.write_text(good + "[serving2]\n")
        said = refused(daemon, 78)
        assert (
            f"{launcher.path} cannot take over: {path}: serving2: unknown key" in said
        )
        assert "hint: " in said
        path.write_text(good.replace("accept_unmeasured = true", ""))
        assert "is unmeasured" in refused(daemon, 78)
        path.write_text(good)

        launcher.write(before="import no_such_module")
        assert "No module named 'no_such_module'" in refused(daemon, 75)
        knows_less = "import tdxd.guest.handover as h; h.READABLE = (0, 1)"
        launcher.write(check=knows_less)
        words = f"it knows state of format 0, 1, not {FORMAT}"
        assert words in refused(daemon, 75)
        launcher.path.unlink()
        assert "No such file or directory" in refused(daemon, 71)
        launcher.write(check="os.chmod(sys.argv[0], 0o644)")
        # Tried out well, and then it cannot be executed: the exec itself fails.
        assert f"execute {launcher.path}: Permission denied" in refused(daemon, 71)

        assert daemon.volume() == mounted
        assert daemon.ctl("retry").returncode == 0
        launcher.write()
        daemon.reexec()
        assert daemon.volume()["since"] == mounted["since"]
        assert "config.reloaded" not in daemon.ctl("events").stdout


def test_a_changed_configuration_is_carried_out(world: World) -> None:
    health, new_health = free_port(), free_port()
    listen = {"listen": f"127.0.0.1:{health}"}
    other = {"id": "other", "image": str(world.directory / "other.img")}
    path = world.directory / "tdxd.toml"
    with world.key_server(), world.daemon(health=listen) as daemon:
        daemon.until_volume("mounted")
        tables = world.config(
            control={"socket": str(daemon.socket_path), "runtime_dir": str(RUN)},
            health={"listen": f"127.0.0.1:{new_health}"},
            volume=[other],
        )
        path.write_text(toml(tables))
        daemon.reexec()
        wait_for(
            lambda: (
                [(one["id"], one["state"]) for one in daemon.status()["volumes"]]
                == [("other", "mounted")]
            ),
            "the new volume, and only that",
        )
        assert len(our_loops()) == 1
        url = f"http://127.0.0.1:{new_health}/readyz"
        with urllib.request.urlopen(url, timeout=5) as reply:
            assert reply.status == 200
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{health}/livez", timeout=5)


def test_another_runtime_directory_means_starting_afresh(world: World) -> None:
    """The old one is closed and removed first."""
    path, other = world.directory / "tdxd.toml", Path(f"{RUN}-other")
    with world.key_server(), world.daemon() as daemon:
        daemon.until_volume("mounted")
        text = path.read_text()
        path.write_text(text.replace(f'"{RUN}"', f'"{other}"'))
        done = daemon.ctl("reexec")
        assert done.returncode == 69, done.stderr
        assert "was started afresh" in done.stderr
        said = f"the runtime directory is {other} now, it was {RUN}"
        assert said in daemon.log.read_text()
        assert not RUN.exists()
        daemon.until_volume("mounted")
        info = Path(f"/proc/{daemon.process.pid}/mountinfo").read_text()
        assert f" {RUN}/" not in info
        assert len(our_loops()) == 1
    assert not other.exists()


def test_while_the_key_server_is_away(world: World) -> None:
    """An exchange under way is given up, and asked for anew until the server is back."""
    with world.daemon() as daemon:
        daemon.until_volume("backoff")
        for _ in range(3):
            daemon.reexec()
            daemon.until_volume("attesting", "backoff")
        with world.key_server():
            daemon.until_volume("mounted")


def test_while_a_key_server_does_not_answer(world: World) -> None:
    """The exchange hangs; the re-exec does not wait for it."""
    with socket.create_server(("127.0.0.1", world.port)), world.daemon() as daemon:
        daemon.until_volume("attesting")
        time.sleep(0.3)
        started_s = time.monotonic()
        daemon.reexec()
        assert time.monotonic() - started_s < 8  # the exchange itself may last 10 s
        daemon.until_volume("attesting")


# --- children -------------------------------------------------------------------


def test_children_that_end_meanwhile(world: World, launcher: Launcher) -> None:
    """Before, between and after: each end is noticed, and what serves is started again."""
    port = free_port()
    with (
        world.key_server(),
        world.daemon(program=launcher.path, serving=serving(port)) as daemon,
    ):
        wait_for(lambda: daemon.status()["serving"]["servers"] != [], "a model server")
        starting = parts(daemon)
        daemon.reexec()  # while it is not ready yet
        assert parts(daemon)["servers"] == starting["servers"]
        assert daemon.ctl("wait", "--timeout", "150").returncode == 0
        shown = daemon.status()["serving"]
        (server,) = shown["servers"]

        between = f"os.kill({server['pid']}, signal.SIGKILL)"
        launcher.write(start=between)
        daemon.reexec()
        launcher.write()
        wait_for(
            lambda: daemon.status()["serving"]["restarts"] == 1, "the end is noticed"
        )
        said = "the model server ended by signal 9"
        assert said in daemon.ctl("events").stdout

        os.kill(daemon.status()["serving"]["front_pid"] or 0, signal.SIGKILL)
        daemon.reexec()
        wait_for(
            lambda: daemon.status()["serving"]["restarts"] == 2, "the end is noticed"
        )
        daemon.until_serving("ready")
        daemon.reexec()
        (server,) = daemon.status()["serving"]["servers"]
        os.kill(server["pid"], signal.SIGKILL)
        wait_for(
            lambda: daemon.status()["serving"]["restarts"] == 3, "the end is noticed"
        )
        daemon.until_serving("ready")
        zombies = [
            pid
            for pid in parts(daemon)["children"]
            if ") Z " in Path(f"/proc/{pid}/stat").read_text()
        ]
        assert zombies == []


def test_state_that_cannot_be_adopted(world: World, launcher: Launcher) -> None:
    """All of the program before is ended, and everything comes up afresh; no secret is in it."""
    port, dump = free_port(), launcher.path.with_name("state")
    with (
        world.key_server(),
        world.daemon(program=launcher.path, serving=serving(port)) as daemon,
    ):
        assert daemon.ctl("wait", "--timeout", "150").returncode == 0
        copy = f"open({str(dump)!r}, 'wb').write(os.pread(STATE, 1 << 24, 0))"
        launcher.write(start=copy)
        daemon.reexec()
        check_state(world, dump.read_bytes(), daemon)

        before = parts(daemon)
        now, to_come = (b"\xa6format" + bytes([n]) for n in (FORMAT, FORMAT + 1))
        launcher.write(
            start="old = os.pread(STATE, 1 << 24, 0)\n"
            f"new = old.replace(bytes({[*now]}), bytes({[*to_come]}))\n"
            "assert new != old and os.pwrite(STATE, new, 0) == len(new)"
        )
        done = daemon.ctl("reexec")
        assert done.returncode == 69
        assert "was started afresh, as pid" in done.stderr
        known = ", ".join(map(str, READABLE))
        words = f"format {FORMAT + 1}, this program knows {known}"
        assert words in daemon.log.read_text()
        for pid in before["children"]:
            assert not Path(f"/proc/{pid}").exists()
        assert daemon.status()["reexecs"] == 0
        daemon.until_serving("ready")
        after = parts(daemon)
        assert after["pid"] == before["pid"]
        assert len(after["mounts"]) == len(before["mounts"]) == 1
        assert len(after["loops"]) == 1


def check_state(world: World, data: bytes, daemon: Daemon) -> None:
    """It is what the daemon runs, and holds neither key nor certificate nor model."""
    state: State = decode_state(data)
    assert state.daemon.volumes[0].mapped is not None
    front = state.daemon.serving.front
    assert front is not None
    assert front.child.pid == daemon.status()["serving"]["front_pid"]
    secret = (world.directory / "m.bundle").read_bytes()[-32:]
    pem = (world.directory / "server.pem").read_bytes().splitlines()
    model = world.directory / "saved_model" / "saved_model.pb"
    for canary in (secret, secret.hex().encode(), pem[2], model.read_bytes()[:64]):
        assert canary not in data


def test_children_die_with_the_new_program(world: World) -> None:
    """The parent-death signal outlives the exec, though the program that set it is gone."""
    port = free_port()
    with (
        world.key_server(),
        world.daemon(serving=serving(port), killed=True) as daemon,
    ):
        assert daemon.ctl("wait", "--timeout", "150").returncode == 0
        daemon.reexec()
        time.sleep(11)  # idle worker threads end after ten seconds
        children = parts(daemon)["children"]
        assert len(children) == 2
        for pid in children:
            assert Path(f"/proc/{pid}").exists()
    wait_for(
        lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()],
        f"the end of {children}",
    )
    config = world.directory / "tdxd.toml"
    assert program("tdxd", "--config", config, "--sweep").returncode == 0
    wait_for(lambda: not our_loops(), "no loop device")


# --- signals, systemd, other commands -----------------------------------------------


def test_a_signal_that_comes_meanwhile_is_obeyed(
    world: World, launcher: Launcher
) -> None:
    """Signals between the two programs wait for the new one."""
    with world.daemon(program=launcher.path, volume=[]) as daemon:
        launcher.write(start="os.kill(os.getpid(), signal.SIGHUP)")
        daemon.reexec()
        wait_for(
            lambda: "signal=SIGHUP" in daemon.ctl("events").stdout, "the signal's event"
        )
        launcher.write(start="os.kill(os.getpid(), signal.SIGTERM)")
        reexec = started(daemon, "reexec")
        assert daemon.process.wait(20) == 0
        reexec.communicate(timeout=20)  # it may have been answered before the end


def test_signals_are_not_lost_whenever_they_come(world: World) -> None:
    """SIGTERM at every moment of a re-exec ends the daemon in order."""
    for delay_s in (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6):
        with world.daemon(volume=[]) as daemon:
            reexec = started(daemon, "reexec")
            time.sleep(delay_s)
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(20) == 0, delay_s
            said, _ = reexec.communicate(timeout=20)
            assert said, delay_s


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


def test_the_service_manager_is_told(world: World, manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "3000000"}
    with world.daemon(env=env, volume=[]) as daemon:
        manager.until("READY=1")
        daemon.reexec()
        reloading = manager.until("RELOADING=1")
        assert reloading[1].startswith("MONOTONIC_USEC=")
        manager.until("WATCHDOG=1")
        manager.until("READY=1")
        manager.until("STATUS=serving")
        manager.until("WATCHDOG=1")
        manager.until("WATCHDOG=1")
        daemon.process.terminate()
        manager.until("STOPPING=1")


def test_the_socket_of_systemd_is_kept(world: World, tmp_path: Path) -> None:
    path, runtime = tmp_path / "activated.sock", Path(f"/run/tdxd-kept-{os.getpid()}")
    config = tmp_path / "tdxd.toml"
    control = {"socket": str(tmp_path / "unused.sock"), "runtime_dir": str(runtime)}
    config.write_text(toml(world.config(volume=[], control=control)))
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.environ['LISTEN_FDNAMES'] = 'control'; os.execv(sys.argv[2], sys.argv[2:])"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [
            *map(str, (BIN / "python", "-c", code, listener.fileno(), BIN / "tdxd"))
        ]
        process = subprocess.Popen(
            [*argv, "--config", str(config)],
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(3):
                done = program("tdxctl", "--socket", path, "reexec")
                assert done.returncode == 0, done.stderr
            assert not (tmp_path / "unused.sock").exists()
        finally:
            process.terminate()
            assert process.wait(30) == 0
        assert path.exists()


def started(daemon: Daemon, *args: str) -> subprocess.Popen[str]:
    """A tdxctl that runs meanwhile."""
    return subprocess.Popen(
        [str(BIN / "tdxctl"), "--socket", str(daemon.socket_path), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_commands_that_last_go_on(world: World) -> None:
    """`events --follow` loses no event and repeats none; `wait` waits on."""
    with world.daemon() as daemon:
        daemon.until_volume("backoff")
        follow = started(daemon, "events", "--follow", "--json")
        wait = started(daemon, "wait", "--timeout", "60")
        time.sleep(0.5)
        for _ in range(2):
            daemon.reexec()
        with world.key_server():
            daemon.until_volume("mounted")
            assert wait.communicate(timeout=30)[0] == "ready\n"
        assert wait.returncode == 0
        time.sleep(0.5)
        follow.send_signal(signal.SIGINT)
        lines = follow.communicate(timeout=30)[0].splitlines()
        heard = [json.loads(line) for line in lines if line.startswith("{")]
        numbers = [one["seq"] for one in heard]
        assert numbers == list(range(1, len(numbers) + 1))
        assert [one["event"] for one in heard].count("daemon.reexecuted") == 2


def test_one_at_a_time_and_only_root(world: World) -> None:
    with world.daemon(volume=[]) as daemon:
        many = [started(daemon, "reexec") for _ in range(3)]
        codes = []
        for one in many:
            said, _ = one.communicate(timeout=60)
            codes.append(one.returncode)
            if one.returncode:
                assert said == "tdxctl: error: tdxd is already being re-executed\n"
        assert 0 in codes
        assert daemon.status()["reexecs"] == codes.count(0)
        assert wire.VERBS["reexec"]  # changes something: uid 0 alone

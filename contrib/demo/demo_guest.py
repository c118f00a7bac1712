"""The same story in a booted guest, driven from outside: systemd, dm-crypt, dm-verity, packages.

The guest is a Debian in software emulation with the packages of `make deb` in it. Nobody logs in:
what is shown of its inside comes through an agent that this test guest alone has.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contrib.demo.demo import (
    DIM,
    END,
    HERE,
    Background,
    DemoError,
    free_port,
    owner_seals,
    run,
    say,
    signing_key,
    write,
)
from contrib.guest.build_image import build_image, built_packages
from contrib.guest.disk import Disk
from contrib.guest.disks import make_ext4
from contrib.guest.machine import Machine

KEYS_NAME = "keys.example"
SERVING_S = 300
TAMPERED_OFFSET = 16 * 1024 * 1024 + 12345


def inside(machine: Machine, command: str, *, expect: int = 0) -> str:
    """Show and run a command in the guest; return its standard output."""
    print(f"{DIM}guest#{END} {command}", flush=True)
    done = machine.run(command, timeout_s=SERVING_S + 60, check=False)
    for text in (done.stdout, done.stderr):
        if text.strip():
            print(text.rstrip(), flush=True)
    if done.code != expect:
        raise DemoError(f"exit code {done.code}, expected {expect}: {command}")
    return done.stdout


def owner_releases(background: Background, port: int) -> str:
    """Start collateral and key server on the owner's machine; return the guest's pin."""
    say(
        "No TDX machine is at hand: tdx-sim plays one, its collateral here, its CPU in the guest"
    )
    run("tdx-sim init platform")
    command = "tdx-sim run platform --pccs-only --pccs 127.0.0.1:0"
    ready = background.start(command, "sim.log")
    pccs = dict(word.split("=", 1) for word in ready.split()[1:])["pccs"]
    say("The owner's key server releases the bundle to this guest alone")
    pin = run(
        f"tdx-keyd init keys --name {KEYS_NAME} --listen 127.0.0.1:{port} "
        f"--simulated-root $(tdx-sim root --der platform) --simulated-collateral-url {pccs}"
    )
    run("tdx-sim measurements platform > policy.toml")
    run("tdx-keyd add keys digits.bundle --policy policy.toml")
    background.start("tdx-keyd serve keys", "keyd.log")
    return pin


def guest_config(pin: str) -> str:
    """Return the daemon's configuration."""
    return f"""\
[key_release]
servers = ["{KEYS_NAME}:50051"]
ca = "/etc/tdxd/ca.pem"
signing_key = "{signing_key(pin)}"

[platform]
tsm = "/run/tdx-sim/report"
event_log = "/run/tdx-sim/CCEL"
rtmr = "/run/tdx-sim/measurements"

[[volume]]
id = "digits"
image = "/srv/models/digits.img"

[serving]
listen = "[::]:8500"

[health]
listen = "[::]:9640"

[security]              # for trying out: nothing measures this machine
accept_unmeasured = true
"""


def delivery() -> Disk:
    """Make the guest's data disk: image, configuration, and the simulated CPU's keys."""
    run(
        "mkdir -p disk/models disk/config && cp digits.img disk/models/ && "
        "cp tdxd.toml keys/ca.pem disk/config/ && cp -r platform disk/platform"
    )
    path = Path.cwd() / "disk.raw"
    make_ext4(Path("disk"), path, label="delivery", spare_bytes=64 * 2**20)
    return Disk(name="delivery", path=path)


def boot(keyd_port: int) -> Machine:
    """Build the guest if need be, switch it on, and wait until it serves."""
    say(
        "The guest: Debian, the packages, and a disk that the host could read and change"
    )
    image = build_image(built_packages())
    tools = Disk(name="tools", path=image.tools, read_only=True)
    machine = Machine(Path.cwd() / "machine", image, disks=(tools, delivery()))
    machine.route_keys_to(keyd_port)
    print(f"{DIM}${END} {shlex.join(machine.command())} &", flush=True)
    try:
        machine.boot()
        say(
            "Power on, and with nobody logging in it attests, opens the image and serves"
        )
        inside(machine, f"tdxctl wait --timeout {SERVING_S}")
        inside(machine, "tdxctl status")
        inside(machine, "tdxctl events")
        inside(
            machine,
            "systemd-analyze time && dmsetup table | sed 's/ [0-9a-f]\\{64\\}/ …/g'",
        )
    except BaseException:
        machine.close()
        raise
    return machine


def ask(port: int) -> str:
    """Send held-out digits over TLS, from outside; return the figures."""
    say("A user asks over TLS, knowing nothing but the certificate")
    target = f"localhost:{port} --ca ca.pem --model digits"
    run(f"tdx-infer predict {target} --input training/digit.npy")
    run(f"tdx-infer predict {target} --input training/images.npy --output answers.npy")
    # The emulated processor has other vector instructions than this one.
    check = f"python {HERE}/check_answers.py training/heldout.npz answers.npy 1e-5"
    return run(check).strip()


def tamper(machine: Machine) -> None:
    """Change the image on the disk under the running guest, and see it refused."""
    say("The host changes a byte of the image on the disk of the running guest")
    disk = machine.disk("delivery")
    place = disk.offset_of("/models/digits.img", TAMPERED_OFFSET)
    run(
        f"printf tampered | dd of={disk.path} bs=1 seek={place} conv=notrunc status=none"
    )
    say("When it is read from the disk again it is an error, and the volume is closed")
    inside(machine, "echo 3 > /proc/sys/vm/drop_caches")
    read = "cat /run/tdxd/volumes/*/models/*/*/*.pb > /dev/null"
    inside(machine, f"nsenter -m -t $(pidof -x tdxd) -- sh -c '{read}'", expect=1)
    deadline = time.monotonic() + 60
    while "failed" not in machine.run("tdxctl status").stdout:
        if time.monotonic() > deadline:
            raise DemoError("the volume did not fail")
        time.sleep(0.5)
    time.sleep(3)
    inside(machine, "tdxctl status")
    run(
        f"tdx-infer predict localhost:{machine.front_port} --ca ca.pem --model digits "
        "--input training/digit.npy --timeout 10",
        expect=75,  # the emulated network takes the connection itself
    )


def story(background: Background) -> str:
    """Tell all of it; return the figures."""
    keyd_port = free_port()
    owner_seals()
    pin = owner_releases(background, keyd_port)
    write("tdxd.toml", guest_config(pin))
    machine = boot(keyd_port)
    try:
        figures = ask(machine.front_port)
        tamper(machine)
        say("Power off")
        machine.shut_down()
    finally:
        machine.close()
    return f"{figures}, guest answered {machine.boot_s:.1f} s after power on"


def main() -> int:
    """Run the demo in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="tdxd-demo-", dir="/var/tmp"))
    os.chdir(directory)
    print(f"demo: working in {directory}")
    background = Background()
    try:
        figures = story(background)
    except (AssertionError, DemoError, subprocess.TimeoutExpired) as exc:
        print(f"demo: error: {exc}", file=sys.stderr)
        return 1
    finally:
        background.stop()
        os.chdir("/")
        shutil.rmtree(directory, ignore_errors=True)
    print(f"\ndemo: ok {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

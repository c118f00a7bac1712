"""Under load, what is served changes: no request fails, and new answers follow the old ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.errors import UnavailableError
from tdxd.user.infer import Model, predict
from tests.steady_stream import CLOCK, INPUT
from tests.system.under_load import (
    Serving,
    assert_clear,
    assert_moved_once,
    assert_one_gap,
    certificate_at,
    late_request,
    told,
)
from tests.system.world import Daemon, World, ok

pytestmark = [pytest.mark.root, pytest.mark.slow]

RUN = Path("/run") / f"tdxd-system-{os.getpid()}"
TWICE = (1, (3.0, 5.0, 7.0, 9.0))
THRICE = (1, (4.0, 7.0, 10.0, 13.0))
"""Another model under the same name and version."""


class Owner:
    """Who seals one generation after the other, each image beside those before it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.generation = 0
        self.pem = (world.directory / "server.pem").read_bytes()

    @property
    def image(self) -> str:
        """The pattern that the configuration has."""
        return str(self.world.directory / "roll-*.img")

    def publish(self, model: Path, *, broken: bool = False) -> Path:
        """Seal the model as `line`, put the image in place, and let the guest have its key."""
        self.generation += 1
        name = f"roll-{self.generation}"
        tree = self.world.directory / name
        shutil.copytree(model, tree / "models" / "line" / "1")
        if broken:
            (tree / "models" / "line" / "1" / "saved_model.pb").write_bytes(b"\xff" * 9)
        (tree / "tls").mkdir()
        (tree / "tls" / "server.pem").write_bytes(self.pem)
        image = self.world.seal(
            tree, name, generation=self.generation, volume_id="roll"
        )
        self.world.allow(name)
        return image

    def publish_more(self, name: str) -> dict[str, str]:
        """Seal a model of another name as a volume of its own; return its `[[volume]]`."""
        tree = self.world.directory / "more"
        shutil.copytree(self.world.next_model, tree / "models" / name / "1")
        image = self.world.seal(tree, "more", generation=1, volume_id="more")
        self.world.allow("more")
        return {"id": "more", "image": str(image)}


@pytest.fixture(scope="module")
def owner(world: World) -> Owner:
    return Owner(world)


@pytest.fixture(scope="module")
def serving(world: World, owner: Owner) -> Iterator[Serving]:
    """The tests share it, one after the other, since a model server takes seconds to start."""
    owner.publish(world.saved_model)
    made = Serving(world, volume=[{"id": "roll", "image": owner.image}])
    with world.key_server():
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(autouse=True)
def end_of_stories(serving: Serving) -> Iterator[None]:
    """Whatever happened: nothing is left half done, and what left was unmounted."""
    yield
    wanted = len(serving.tables["volume"])
    assert len(serving.daemon.status()["serving"]["servers"]) == 1
    info = Path(f"/proc/{serving.daemon.process.pid}/mountinfo").read_text()
    assert info.count(f" {RUN}/volumes/") == len(mounted()) == wanted


def reload(serving: Serving) -> float:
    """Reload, with success; return how long it took."""
    started_s = CLOCK()
    done = serving.daemon.ctl("reload")
    took_s = CLOCK() - started_s
    assert done.returncode == 0, done.stdout + done.stderr + log(serving.daemon)
    return took_s


def log(daemon: Daemon) -> str:
    return daemon.log.read_text()[-3000:]


def mounted() -> set[str]:
    return {path.name for path in (RUN / "volumes").iterdir()}


def served_now(serving: Serving) -> tuple[int, tuple[float, ...]]:
    answer = predict(serving.endpoint, Model(name="line"), {"x": INPUT})
    return answer.version, tuple(answer.outputs["y"][0].tolist())


def test_a_new_generation(serving: Serving, owner: Owner) -> None:
    """What is on its way when the front moves over is answered by the old server."""
    slowly = {"request": late_request(200), "kept": 1, "in_flight": 2}
    with serving.stream() as stream, serving.stream(**slowly) as late:
        owner.publish(owner.world.next_model)
        took_s = reload(serving)
        done_s = CLOCK()
        stream.more()
        late.more()
    print(told("new generation", stream), f"reload took {took_s:.2f} s")
    assert stream.failures == late.failures == []
    assert_moved_once(stream, TWICE, THRICE)
    assert {one.seen for one in stream.answers if one.sent_s > done_s} == {THRICE}
    assert mounted() == {f"roll@{owner.generation}"}
    moved_s = min(one.sent_s for one in stream.answers if one.seen == THRICE)
    drained = [
        one for one in late.answers if one.seen == TWICE and one.ended_s > moved_s
    ]
    print(f"{len(drained)} of the old server's answers came after it")
    assert drained


def test_a_certificate_comes_with_a_new_generation(
    serving: Serving, owner: Owner
) -> None:
    """New connections see the new one; what had connected goes on; the front is not restarted."""
    front = serving.front_pid()
    owner.pem = believed_certificate(serving, "second.example.com")
    old = certificate_at(serving.port)
    with serving.stream() as stream:
        owner.publish(owner.world.next_model)
        took_s = reload(serving)
        stream.more()
    print(told("certificate of a generation", stream), f"reload took {took_s:.2f} s")
    assert stream.failures == []
    assert certificate_at(serving.port) != old
    assert serving.front_pid() == front


def believed_certificate(serving: Serving, name: str) -> bytes:
    """Return another certificate for localhost with its key; clients believe it from now on."""
    pem, public = serving.world.directory / name, serving.world.directory / f"{name}.ca"
    ok("tdx-seal", "cert", name, "localhost", "-o", pem, "--cert-out", public)
    serving.ca_pem += public.read_bytes()
    return pem.read_bytes()


def test_a_certificate_that_is_a_secret_of_its_own(
    serving: Serving, owner: Owner
) -> None:
    """It takes the place of the volume's, and is itself replaced, while the front runs on."""
    front = serving.front_pid()
    server = serving.server_pid()
    names = ("third.example.com", "fourth.example.com")
    pems = [believed_certificate(serving, name) for name in names]
    seen = [certificate_at(serving.port)]
    with serving.stream() as stream:
        serving.configure(serving={"tls_secret": "front"})
        for pem in pems:
            put_secret(owner.world, pem)
            took_s = reload(serving)
            stream.more()
            seen.append(certificate_at(serving.port))
    print(told("certificate of its own", stream), f"reload took {took_s:.2f} s")
    assert stream.failures == []
    assert len(set(seen)) == len(seen)
    assert serving.front_pid() == front
    assert serving.server_pid() == server


def put_secret(world: World, pem: bytes) -> None:
    file = world.directory / "secret.pem"
    file.write_bytes(pem)
    options = ("--tls-pem", file, "--policy", world.directory / "policy.toml")
    ok("tdx-keyd", "secret", "put", world.directory / "keys", "front", *options)


def test_a_model_is_added(serving: Serving, owner: Owner) -> None:
    before = served_now(serving)
    with serving.stream() as stream:
        serving.configure(
            volume=[*serving.tables["volume"], owner.publish_more("curve")]
        )
        took_s = reload(serving)
        answer = predict(serving.endpoint, Model(name="curve"), {"x": INPUT})
        stream.more()
    print(told("model added", stream), f"reload took {took_s:.2f} s")
    assert tuple(answer.outputs["y"][0].tolist()) == THRICE[1]
    assert stream.failures == []
    assert {one.seen for one in stream.answers} == {before}


def test_a_model_is_removed_and_flags_change(serving: Serving, owner: Owner) -> None:
    """Who calls a model that stays notices nothing."""
    before = served_now(serving)
    with serving.stream() as stream:
        roll = {"id": "roll", "image": owner.image}
        serving.configure(volume=[roll], serving={"intra_op_threads": 1})
        took_s = reload(serving)
        with pytest.raises(UnavailableError, match=r"NOT_FOUND.*curve"):
            predict(serving.endpoint, Model(name="curve"), {"x": INPUT})
        stream.more()
    print(told("model removed, flags changed", stream), f"reload took {took_s:.2f} s")
    assert stream.failures == []
    assert {one.seen for one in stream.answers} == {before}
    argv = Path(f"/proc/{serving.server_pid()}/cmdline").read_bytes()
    assert b"intra_op_parallelism=1" in argv


def test_a_generation_that_does_not_load(serving: Serving, owner: Owner) -> None:
    """The old one serves on, and whoever reloads is told both."""
    before, there = served_now(serving), mounted()
    with serving.stream() as stream:
        image = owner.publish(owner.world.saved_model, broken=True)
        done = serving.daemon.ctl("reload")
        stream.more()
    print(told("a generation that does not load", stream), done.stderr)
    assert done.returncode == 75
    for words in (
        "what was there before still serves",
        f"generation {owner.generation} of volume roll cannot be served",
        "Error parsing message with type 'tensorflow.SavedModel'",
    ):
        assert words in done.stderr
    assert stream.failures == []
    assert {one.seen for one in stream.answers} == {before}
    assert mounted() == there
    assert serving.daemon.ctl("health", "ready").returncode == 0
    withdraw(owner, image)
    reload(serving)


def withdraw(owner: Owner, image: Path) -> None:
    """Take the newest generation back, from the guest and from the key server."""
    image.unlink()
    number = ("--generation", owner.generation)
    ok("tdx-keyd", "remove", owner.world.directory / "keys", "roll", *number)


def test_in_place_there_is_a_gap_and_it_is_told(serving: Serving, owner: Owner) -> None:
    """For machines that cannot hold two model servers; the front stays and says so."""
    server, front = serving.server_pid(), serving.front_pid()
    models = {TWICE: owner.world.saved_model, THRICE: owner.world.next_model}
    old = served_now(serving)
    (new,) = models.keys() - {old}
    serving.configure(serving={"strategy": "replace-in-place"})
    reload(serving)
    assert serving.server_pid() == server
    with serving.stream() as stream:
        changed_s = CLOCK()
        owner.publish(models[new])
        took_s = reload(serving)
        stream.more()
    print(told("replaced in place", stream), f"reload took {took_s:.2f} s")
    assert_clear(stream.failures)
    assert_one_gap(stream, changed_s)
    assert {one.details for one in stream.failures} == {"no model server is ready"}
    assert_moved_once(stream, old, new)
    assert serving.front_pid() == front
    assert mounted() == {f"roll@{owner.generation}"}

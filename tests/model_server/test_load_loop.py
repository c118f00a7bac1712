"""The loop of the loader's thread, without TensorFlow: what reloads do, and do not."""

from __future__ import annotations

import threading

import grpc
import pytest
from google.protobuf import text_format

from tdxd.host import tf_messages
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.flags import StartError
from tdxd.model_server.health import Health
from tdxd.model_server.lifecycle import Lifecycle, RetryPolicy
from tdxd.model_server.load_loop import ConfigFile, LoadLoop
from tdxd.model_server.model_config import ModelConfig, parse_model_config
from tdxd.model_server.registry import Registry, Servable, State

DEADLINE_S = 30.0


def models(*names, label=0):
    more = f'version_labels {{ key: "l" value: {label} }}' if label else ""
    entries = [
        f'config {{ name: "{name}" base_path: "/{name}" model_platform: "tensorflow" {more} }}'
        for name in names
    ]
    return f"model_config_list {{ {' '.join(entries)} }}"


class World:
    """A loop in a thread; directories and loads in memory. A load of `held` waits for the gate."""

    def __init__(self, *, spread_labels=False, config_file=None):
        self.names = {"/m": ["1"], "/held": ["1"], "/bad": ["1"], "/n": ["1"]}
        self.gate, self.entered = threading.Event(), threading.Event()
        self.ready = threading.Event()
        self.lines: list[str] = []
        self.health = Health()
        self.registry = Registry({"m": {}})
        lifecycle = Lifecycle(
            models=(ModelConfig(name="m", base_path="/m"),),
            registry=self.registry,
            retry=RetryPolicy(retries=0, interval_s=1.0),
            list_names=self.names.__getitem__,
            load=self.load,
            log=self.lines.append,
        )
        self.loop = LoadLoop(
            lifecycle,
            self.registry,
            self.health,
            poll_wait_s=0,
            spread_labels=spread_labels,
            log=self.lines.append,
            config_file=config_file,
        )
        self.thread = threading.Thread(target=self.loop.run, args=(self.ready.set,))
        self.thread.start()
        assert self.ready.wait(DEADLINE_S)

    def load(self, path):
        if path.startswith("/bad"):
            raise RpcFailure(grpc.StatusCode.DATA_LOSS, "broken")
        if path.startswith("/held"):
            self.entered.set()
            assert self.gate.wait(DEADLINE_S)
        return Servable(signatures={}, runners={})

    def reload(self, text, waits=lambda: True):
        config = tf_messages.model_server_config().ModelServerConfig()
        self.loop.reload(text_format.Parse(text, config), waits)

    def refusal(self, text, waits=lambda: True):
        with pytest.raises(RpcFailure) as caught:
            self.reload(text, waits)
        return caught.value.code.name, caught.value.text


@pytest.fixture
def make():
    made = []

    def make(**options):
        made.append(World(**options))
        return made[-1]

    yield make
    for world in made:
        world.gate.set()
        world.loop.stop()
        world.thread.join()


def test_a_reload_returns_when_its_new_models_are_there(make):
    world = make()
    thread = threading.Thread(target=world.reload, args=(models("m", "held"),))
    thread.start()
    assert world.entered.wait(DEADLINE_S)
    assert thread.is_alive()
    world.gate.set()
    thread.join()
    assert world.registry.available("held") == (1,)


def test_a_caller_who_gives_up_frees_the_next_reload(make):
    world = make()
    code, _text = world.refusal(models("m", "held"), waits=lambda: False)
    assert code == "CANCELLED"
    world.gate.set()
    world.reload(models("m", "n"))
    assert world.registry.available("n") == (1,)


def test_an_empty_list_unloads_everything(make):
    world = make()
    world.reload("model_config_list {}")
    assert world.registry.versions("m")[1].state is State.END
    assert world.health.status("") == 1  # of no models, every one is there


def test_a_failed_model_is_told_and_may_leave_again(make):
    world = make()
    assert world.refusal(models("m", "bad")) == (
        "UNKNOWN",
        (
            "1 model(s) did not become available: "
            "{{{name: bad version: 1} due to error: broken}, }"
        ),
    )
    assert world.health.status("") == 2
    world.reload(models("m"))
    assert world.health.status("") == 1


def test_labels_of_versions_that_are_not_there(make):
    text = models("m", label=7)
    refused = "Request to assign label to version 7 of model m, which is not currently "
    assert make().refusal(text)[1].startswith(refused)
    lenient = make(spread_labels=True)
    lenient.reload(text)
    assert lenient.registry.labels("m") == {"l": 7}
    # As in the original, not even then from one version to another that is not there.
    other = lenient.refusal(models("m", label=8))
    assert other[0] == "FAILED_PRECONDITION"
    lenient.reload(models("m", label=1))
    assert lenient.registry.labels("m") == {"l": 1}


def test_a_config_file_that_cannot_be_read_changes_nothing(make):
    read = threading.Event()

    def unreadable():
        read.set()
        raise StartError("gone")

    file = ConfigFile(
        text="",
        poll_wait_s=1,
        read=unreadable,
        parse=lambda text: parse_model_config(text, source="f"),
    )
    world = make(config_file=file)
    assert read.wait(DEADLINE_S)
    world.reload(models("m"))  # its turn comes after the file's
    assert "the models stay as they are: gone" in world.lines
    assert world.registry.available("m") == (1,)

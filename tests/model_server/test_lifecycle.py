"""Loading, retrying, replacing and unloading, without TensorFlow or a clock."""

from __future__ import annotations

import grpc
import pytest

from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.lifecycle import Lifecycle, RetryPolicy
from tdxd.model_server.model_config import ModelConfig
from tdxd.model_server.registry import Registry, Servable, State
from tdxd.model_server.versions import Policy


class World:
    """Directories and loads in memory; `broken` maps a path to the text of its failure."""

    def __init__(self, *models, retries=1):
        self.names: dict[str, list[str]] = {}
        self.broken: dict[str, str] = {}
        self.loads: list[str] = []
        self.lines: list[str] = []
        self.models = models or (ModelConfig(name="m", base_path="/m"),)
        self.registry = Registry({model.name: {} for model in self.models})
        self.lifecycle = Lifecycle(
            models=self.models,
            registry=self.registry,
            retry=RetryPolicy(retries=retries, interval_s=10.0),
            list_names=self.list_names,
            load=self.load,
            log=self.lines.append,
        )

    def list_names(self, path):
        if path not in self.names:
            raise FileNotFoundError(2, "No such file or directory")
        return self.names[path]

    def load(self, path):
        self.loads.append(path)
        if path in self.broken:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, self.broken[path])
        return Servable(signatures={}, runners={})

    def turn(self, now_s=0.0):
        self.lifecycle.scan()
        self.lifecycle.step(now_s)

    def states(self, model="m"):
        versions = self.registry.versions(model)
        return {version: one.state for version, one in versions.items()}


def test_the_latest_version_is_loaded_once():
    world = World()
    world.names["/m"] = ["1", "2", "tmp"]
    world.turn()
    world.turn()
    assert world.loads == ["/m/2"]
    assert world.states() == {2: State.AVAILABLE}
    assert world.lifecycle.complete()


def test_a_new_version_is_loaded_before_the_old_one_goes():
    world = World()
    world.names["/m"] = ["1"]
    world.turn()
    world.names["/m"] = ["1", "2"]
    world.lifecycle.scan()
    assert world.states() == {2: State.LOADING, 1: State.AVAILABLE}
    world.lifecycle.step(0.0)
    assert world.states() == {2: State.AVAILABLE, 1: State.END}
    order = [line for line in world.lines if "{name: m version:" in line]
    assert order[-2:] == [
        "Successfully loaded servable version {name: m version: 2}",
        "Unloaded servable version {name: m version: 1}",
    ]


def test_a_bad_new_version_leaves_the_old_one_serving():
    world = World(retries=0)
    world.names["/m"] = ["1"]
    world.turn()
    world.names["/m"] = ["1", "2"]
    world.broken["/m/2"] = "bad"
    world.turn()
    world.turn(99.0)
    assert world.states() == {2: State.END, 1: State.AVAILABLE}
    assert world.loads == ["/m/1", "/m/2"]
    assert world.lifecycle.boot_failure() == ""


def test_a_failed_version_is_tried_again_when_its_directory_was_gone():
    world = World(retries=0)
    world.names["/m"] = ["1"]
    world.broken["/m/1"] = "bad"
    world.turn()
    world.names["/m"] = []
    world.turn()
    assert world.states() == {}
    world.names["/m"] = ["1"]
    world.broken.clear()
    world.turn()
    assert world.states() == {1: State.AVAILABLE}


def test_a_load_is_retried_after_the_interval_and_meanwhile_looks_like_loading():
    world = World(retries=1)
    world.names["/m"] = ["1"]
    world.broken["/m/1"] = "bad"
    world.turn(0.0)
    assert world.states() == {1: State.LOADING}
    assert world.lifecycle.next_due_s() == 10.0
    world.turn(9.9)
    assert world.loads == ["/m/1"]
    world.turn(10.0)
    assert world.loads == ["/m/1", "/m/1"]
    state = world.registry.versions("m")[1]
    assert (state.state, state.error_code, state.error_text) == (State.END, 5, "bad")
    assert world.lifecycle.next_due_s() is None


def test_a_failed_start_is_told_in_the_originals_words():
    world = World(retries=0)
    world.names["/m"] = ["1"]
    world.broken["/m/1"] = "Not found: x"
    world.turn()
    assert world.lines[-2:] == [
        "Loading servable: {name: m version: 1} failed: Not found: x",
        "Servable {name: m version: 1} cannot be loaded: Not found: x",
    ]
    assert world.lifecycle.boot_failure() == (
        "1 servable(s) did not become available: "
        "{{{name: m version: 1} due to error: Not found: x}, }"
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            {},
            (
                "Could not find base path /m for servable m with error "
                "No such file or directory"
            ),
        ),
        (
            {"/m": ["a"]},
            (
                "No versions of servable m found under base path /m. Did you forget to name "
                "your leaf directory as a number (eg. '/1/')?"
            ),
        ),
    ],
)
def test_a_model_without_a_version_waits_and_says_so_once(names, words):
    world = World()
    world.names = names
    world.turn()
    world.turn()
    assert world.lines == [words]
    assert not world.lifecycle.complete()
    assert world.lifecycle.boot_failure() == ""
    world.names = {"/m": ["1"]}
    world.turn()
    assert world.lifecycle.complete()


def test_a_path_that_vanishes_keeps_its_model_and_holds_up_no_other():
    world = World(
        ModelConfig(name="a", base_path="/a"), ModelConfig(name="b", base_path="/b")
    )
    world.names = {"/a": ["1"], "/b": ["1"]}
    world.turn()
    world.names = {"/b": ["1", "2"]}
    world.turn()
    assert world.states("a") == {1: State.AVAILABLE}
    assert world.states("b") == {2: State.AVAILABLE, 1: State.END}


def test_an_empty_directory_unloads_everything_and_a_return_loads_again():
    world = World()
    world.names["/m"] = ["1"]
    world.turn()
    world.names["/m"] = []
    world.turn()
    assert world.states() == {1: State.END}
    world.names["/m"] = ["1"]
    world.turn()
    assert world.states() == {1: State.AVAILABLE}


def test_policy_all_serves_every_version():
    world = World(ModelConfig(name="m", base_path="/m", policy=Policy(kind="all")))
    world.names["/m"] = ["3", "1"]
    world.turn()
    assert world.states() == {3: State.AVAILABLE, 1: State.AVAILABLE}

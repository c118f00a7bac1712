"""ModelServerConfig in text form."""

from __future__ import annotations

import pytest

from tdxd.model_server.flags import StartError
from tdxd.model_server.model_config import parse_model_config
from tdxd.model_server.versions import Policy


def parse(text):
    return parse_model_config(text, source="models.config")


def one(fields):
    return f'model_config_list {{ config {{ model_platform: "tensorflow" {fields} }} }}'


def test_models_policies_and_labels():
    models = parse(
        'model_config_list { config { name: "a" base_path: "/m/a" '
        'model_platform: "tensorflow" } config { name: "b" base_path: "/m/b" '
        'model_platform: "tensorflow" model_version_policy { specific { versions: 3 '
        'versions: 4 } } version_labels { key: "stable" value: 3 } } }'
    )
    assert [model.name for model in models] == ["a", "b"]
    assert models[0].policy == Policy()
    assert models[1].policy == Policy(kind="specific", versions=frozenset([3, 4]))
    assert models[1].labels == {"stable": 3}


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        ("latest { num_versions: 2 }", Policy(count=2)),
        ("latest {}", Policy()),
        ("all {}", Policy(kind="all")),
    ],
)
def test_version_policies(policy, want):
    fields = f'name: "a" base_path: "/a" model_version_policy {{ {policy} }}'
    assert parse(one(fields))[0].policy == want


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model_config_list {",
            "Error parsing text-format tensorflow.serving.ModelServerConfig",
        ),
        ("nonsense: 1", "Error parsing text-format"),
        ("", "no model_config_list"),
        ("custom_model_config {}", "no model_config_list"),
        (one('name: "a" base_path: "a"'), "Expected model a to have an absolute path"),
        (one('base_path: "/a"'), "a model has no name"),
        (
            'model_config_list { config { name: "a" base_path: "/a" } }',
            "Illegal setting neither ModelServerConfig::model_type (deprecated)",
        ),
        (
            one(
                'name: "a" base_path: "/a" } config { name: "a" base_path: "/b" '
                'model_platform: "tensorflow"'
            ),
            "Illegal to list model a multiple times in config list",
        ),
    ],
)
def test_refused(text, words):
    with pytest.raises(StartError) as caught:
        parse(text)
    assert words in caught.value.message

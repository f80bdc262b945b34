"""layerskip.json: written as readable JSON, read as typed values, and refused in one line where it is malformed."""

import json

import pytest

from layerskip_recipes.acceptance.measuring import exits_to_measure
from layerskip_recipes.acceptance.tokens_per_round import TokensPerRound
from layerskip_recipes.acceptance.trained_exits import TrainedExits, read_trained_exits, write_description
from layerskip_recipes.errors import ConfigError

RATES = {"greedy": [1.5, 1.75], "sampled": [1.4, 1.5]}
DESCRIPTION = {
    "exits": [2, 4, 8],
    "vocabulary": [5, 3, 7],
    "measured": {"on": "dataset_val", "labels": 99, "exits": {"2": {"512": RATES, "all": RATES}}},
    "curriculum": None,
    "layer_dropout": {"prob": 0.1},
}


def measured(exits):
    return json.dumps({"measured": {"on": "training", "labels": 1, "exits": exits}})


def test_what_is_written_is_read(tmp_path):
    write_description(tmp_path, DESCRIPTION)
    text = (tmp_path / "layerskip.json").read_text()
    assert json.loads(text) == DESCRIPTION
    assert '\n  "vocabulary": [5, 3, 7],\n' in text and '\n        "512": {' in text
    found = read_trained_exits(tmp_path)
    assert found.exits == [2, 4, 8] and found.vocabulary == [5, 3, 7] and found.measured.labels == 99
    assert found.measured.exits[2]["512"] == TokensPerRound(greedy=[1.5, 1.75], sampled=[1.4, 1.5])


def test_a_file_of_earlier_versions_names_the_exits_only(tmp_path):
    assert read_trained_exits(tmp_path) is None
    (tmp_path / "layerskip.json").write_text('{"exits": [4, 8], "steps": 3}')
    found = read_trained_exits(tmp_path)
    assert (found.exits, found.vocabulary, found.measured) == ([4, 8], None, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Invalid JSON"),
        ('{"measured": {"on": "elsewhere", "labels": 1}}', "measured.on: "),
        ('{"vocabulary": [-1]}', "vocabulary.0: "),
        (measured({"2": {"all": RATES, "2k": RATES}}), "measured.exits.2.2k"),
        (measured({"2": {"512": RATES}}), "measured: Value error, exit 2"),
        (measured({"2": {"all": RATES | {"sampled": [1.5]}}}), "exits.2.all: Value error, its lists"),
        (measured({"2": {"all": RATES | {"greedy": [1.5, float("nan")]}}}), "exits.2.all.greedy.1: "),
    ],
)
def test_a_malformed_file_is_one_clear_error(text, reason, tmp_path):
    (tmp_path / "layerskip.json").write_text(text)
    with pytest.raises(ConfigError) as e:
        read_trained_exits(tmp_path)
    assert "layerskip.json' cannot be read (" in str(e.value) and reason in str(e.value)
    assert str(e.value).endswith("delete or repair it") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"num_layers": 8}, True),
        ({"num_layers": 12}, False),
        ({"exits": [2, 9]}, False),
        ({"vocabulary": [5, 10]}, False),
        ({"measured": {"on": "training", "labels": 1, "exits": {"9": {"all": RATES}}}}, False),
    ],
)
def test_the_file_of_another_model_is_ignored_with_a_warning(changes, fits, tmp_path, caplog):
    """A model of 8 layers and 10 tokens."""
    write_description(tmp_path, DESCRIPTION | changes)
    assert (read_trained_exits(tmp_path, 8, 10) is not None) == fits
    assert ("is ignored: it describes another model" in caplog.text) != fits


@pytest.mark.parametrize(
    ("trained", "layers", "exit_layer"),
    [
        (range(1, 33), 32, 5),  # the paper's Llama 2 7B
        (range(1, 31), 30, 4),  # as the exit that hf/* train
        ([3, 5, 28], 28, 3),  # both are as near to 4
        ([6, 30], 30, 6),
        ([12, 24], 24, 12),
        ([24], 24, None),
        ([], 24, None),
    ],
)
def test_the_trained_exit_nearest_to_a_seventh_of_the_depth_drafts(trained, layers, exit_layer):
    assert TrainedExits(exits=list(trained)).exit_that_drafts(layers) == exit_layer


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([30], []),
        ([6, 30], [6]),
        ([3, 9, 16, 23, 30], [3, 9, 16, 23]),
        ([*range(1, 31)], [4, 7, 11, 15]),
        ([25, 26, 27, 28, 29, 30], [25]),
    ],
)
def test_exits_are_measured_up_to_half_of_the_depth_or_all_of_a_few(trained, expected):
    assert exits_to_measure(trained, 30) == expected

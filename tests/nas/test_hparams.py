from __future__ import annotations

from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from nas.choices import Choice, Choices, Subset
from nas.hparams import BUDGET, experiment, session_start
from nas.trial import Result, Trial


class Spaceless:
    """All of a space that hyperparameters need."""

    def __init__(self, *choices: Choice | Subset) -> None:
        self.choices = Choices(choices)


def test_columns_list_what_may_be_picked_and_the_dash() -> None:
    space: Any = Spaceless(
        Choice("op", ["conv", "none"], open_only=("none",)), Choice("k", [3, 5])
    )
    assert _columns(space) == {"op": {"conv", "-"}, "k": {"3", "5", "-"}, BUDGET: set()}


def test_a_subset_lists_its_combinations_unless_there_are_too_many() -> None:
    space: Any = Spaceless(Subset("few", (0, 1, 2), 2), Subset("many", tuple(range(12)), 6))
    assert _columns(space) == {"few": {"0 1", "0 2", "1 2", "-"}, "many": set(), BUDGET: set()}


def test_a_trial_tells_its_picks_in_the_words_of_the_columns() -> None:
    space: Any = Spaceless(
        Subset("inputs", (0, 1, 2), 2), Choice("k", [3, 5]), Choice("b", [True])
    )
    summary = session_start(space, Trial(4, {"inputs": [0, 2], "k": 5}, 9), Result("ok"))
    told = _parsed(summary).session_start_info.hparams
    assert {n: told[n].string_value for n in ("inputs", "k", "b")} == {
        "inputs": "0 2",
        "k": "5",
        "b": "-",
    }
    assert told[BUDGET].number_value == 9


def _columns(space: Any) -> dict[str, set[str]]:
    infos = _parsed(experiment(space, ["error"])).experiment.hparam_infos
    return {i.name: {v.string_value for v in i.domain_discrete.values} for i in infos}


def _parsed(summary: Any) -> Any:
    (value,) = summary.value
    return HParamsPluginData.FromString(value.metadata.plugin_data.content)

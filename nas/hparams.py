"""A search's choices and trials as TensorBoard's HPARAMS tab reads them: one run a trial.

`torch.utils.tensorboard` writes a further run for each set of hyperparameters, which this avoids.
tensorboard is imported when something is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

from nas.choices import Decision, Pick, Subset
from nas.space import Space
from nas.trial import Result, Trial

MISSING = "-"
MOST_COMBINATIONS = 32
BUDGET = "trial/budget"


def experiment(space: Space, metrics: Sequence[str]) -> Any:
    """Names and options of all choices, and the metrics to show: once for a whole search."""
    from tensorboard.plugins.hparams import summary_v2 as hp

    domains = {c.name: _options(c) for c in space.choices}
    known = [hp.HParam(n, hp.Discrete(found) if found else None) for n, found in domains.items()]
    return hp.hparams_config_pb([*known, hp.HParam(BUDGET)], [hp.Metric(m) for m in metrics])


def session_start(space: Space, trial: Trial, result: Result) -> Any:
    """What a trial picked; `-` for choices that are open or do not exist under its picks."""
    from tensorboard.plugins.hparams import summary_v2 as hp

    picked = {c.name: _value(trial.picks.get(c.name)) for c in space.choices}
    begun = time.time() - result.seconds
    return hp.hparams_pb({**picked, BUDGET: trial.budget}, f"trial {trial.number}", begun)


def session_end(result: Result) -> Any:
    """That a trial has ended, and whether well."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    status = Status.Value("STATUS_SUCCESS" if result.usable else "STATUS_FAILURE")
    info = HParamsPluginData(
        session_end_info=SessionEndInfo(status=status, end_time_secs=time.time())
    )
    held, nothing = metadata.create_summary_metadata(info), metadata.NULL_TENSOR
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=held, tensor=nothing)
    return Summary(value=[value])


def _options(choice: Decision) -> list[str]:
    """What a column may hold, to filter by; nothing where a subset has too many combinations."""
    if isinstance(choice, Subset):
        if comb(len(choice.items), choice.k) > MOST_COMBINATIONS:
            return []
        picks: list[Pick] = [list(held) for held in combinations(choice.items, choice.k)]
    else:
        picks = list(choice.labels)
    return [*(_value(pick) for pick in picks), MISSING]


def _value(pick: Pick | None) -> str:
    if pick is None:
        return MISSING
    return " ".join(map(str, pick)) if isinstance(pick, list) else str(pick)

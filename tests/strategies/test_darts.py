from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas import Evaluate, Flops, NonZeros, search
from nas.tasks import digits
from nas.trial import Objective, Problem
from search_spaces.cell import cell
from search_spaces.mlp import mlp
from strategies.bilevel import Bilevel, Rank
from strategies.darts import Darts, derive, one_hot_mixture

CELLS = cell((1, 8, 8), 10, cells=1, channels=4, nodes=2, sparsities=("dense", "0.5"))
MLP = mlp((1, 8, 8), 10, depths=(1, 2), widths=(32, 64), sparsities=("dense", "0.5", "0.9"))


def test_deriving_from_a_one_hot_mixture_gives_the_architecture_back() -> None:
    for seed in range(10):
        picks = CELLS.sample(np.random.default_rng(seed))
        mixture = one_hot_mixture(CELLS, picks)
        whole = {c.name: [1.0 / len(c.open_labels)] * len(c.open_labels) for c in CELLS.choices}
        assert derive(CELLS, whole | mixture) == picks


def test_an_edge_is_as_strong_as_its_heaviest_operation_other_than_none() -> None:
    mixture = {
        c.name: [0.1] * len(c.open_labels) for c in CELLS.choices if not c.name.endswith("inputs")
    }
    for edge, none, best in (("0-3", 0.9, 0.01), ("1-3", 0.0, 0.5), ("2-3", 0.0, 0.4)):
        mixture[f"cell_normal/{edge}/op"] = [none, best] + [0.0] * 6
    picks = derive(CELLS, mixture)
    assert picks["cell_normal/3/inputs"] == [1, 2]
    assert picks["cell_normal/1-3/op"] == "max_pool_3x3"


def test_a_round_learns_weights_and_mixture_and_a_penalty_makes_it_cheaper() -> None:
    task, found = digits(), {}
    for penalty in (0.0, 3.0):
        torch.manual_seed(0)
        network = MLP.build({})
        before = {k: v.clone() for k, v in network.state_dict().items()}
        fit = Bilevel(penalty=penalty, mixture_lr=0.1, lr=0.1)
        found[penalty] = fit.fit(network, task, 3, lambda step, metrics: True)
        assert any((before[k] != v).any() for k, v in network.state_dict().items())
        assert found[penalty]["entropy"] < 1
    assert found[0.0]["error"] < 0.5
    assert found[3.0]["expected_flops"] < 0.5 * found[0.0]["expected_flops"]


def test_rounds_give_closed_trials_and_a_ranking_by_the_supernet(tmp_path: Path) -> None:
    evaluate = Evaluate(digits(), costs=[NonZeros(), Flops()])
    run = search(MLP, Darts(seed=0), evaluate, out=tmp_path / "run", trials=3, epochs=2)
    closed = [n for n, r in run.records.items() if run.is_closed(r)]
    last = max(run.records)
    ranked = run.records[last]
    assert len(closed) == 3 and isinstance(ranked.trial.fit, Rank)
    judged = [ranked.result.metrics[f"supernet_error/{n}"] for n in closed]
    assert ranked.trial.parent == max(n for n in run.records if n not in closed and n != last)
    assert min(judged) < 0.9  # chance, of ten classes
    penalties = [
        r.trial.fit.penalty for r in run.records.values() if isinstance(r.trial.fit, Bilevel)
    ]
    assert penalties == [0.0, 0.5, 1.0]


def test_an_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="cost is nonzeros or flops, got 'latency_ms'"):
        Darts(cost="latency_ms").start(Problem(MLP, (Objective("error"),), {}, 1, 1))


def test_a_resumed_run_keeps_the_number_of_rounds_that_penalties_are_spread_over(
    tmp_path: Path,
) -> None:
    evaluate = Evaluate(digits(), costs=(Flops(),))
    how: dict[str, Any] = {"out": tmp_path, "epochs": 1}
    search(MLP, Darts(), evaluate, trials=1, **how)
    before = (tmp_path / "trials.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"run.json: strategy was .*'trials': 1}, is .*: 2}"):
        search(MLP, Darts(), evaluate, trials=2, resume=True, **how)
    assert (tmp_path / "trials.jsonl").read_bytes() == before

"""What this report tells of a sparse result, and what it does not.

The rows are distinctions that Liu and Wang ask authors to make ("Ten Lessons We Have Learned in
the New Sparseland", 2023, 2302.02596), in our words.
"""

from __future__ import annotations

from nas.reporting.report import Report

WHEN = {
    "Magnitude": "during training, dense to sparse; the mask moves until it is fixed",
    "LearnedScores": "during training, scores beside weights; the mask moves to the end",
    "OneShot": "before training, by the first magnitudes; the mask is static",
    "RandomMask": "before training, at random; the mask is static",
}


def answers(report: Report) -> list[tuple[str, str]]:
    """Rows of distinction and answer."""
    return [
        (
            "sparse or dense",
            "beside a dense twin and the dense parent, packed and trained likewise",
        ),
        ("small or sparse", "parameters and non-zeros both; the twin has the same shapes"),
        ("unstructured or structured", _patterns(report)),
        ("how and when masks come", _when(report)),
        ("counted or real speed", "packed networks timed; FLOPs only compared with the times"),
        ("on what hardware", f"{report.made['device']}, {report.made['isa']}, one thread"),
        ("equal training", "epochs of the point for all, seeds of one series"),
        ("plain baselines", _baselines(report)),
        ("spread", f"{report.plan.seeds} seeds with 95 % intervals; speed with quartiles"),
        ("not reported", "cost of training, energy, robustness, transfer to other tasks"),
    ]


def _patterns(report: Report) -> str:
    kinds = [f"{count} x {label}" for label, count in report.best.patterns.items()]
    return f"weights of the best point: {', '.join(kinds)}"


def _when(report: Report) -> str:
    if report.search["task"] is None:
        return "by the user's own training"
    recipe = report.search["training"]["recipe"]["name"]
    return f"{WHEN.get(recipe, recipe)} ({recipe})"


def _baselines(report: Report) -> str:
    found = report.baseline
    return f"{len(found.matches)} random networks of as many non-zeros" if found else "none"

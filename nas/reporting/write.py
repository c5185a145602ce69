"""Writing a report into the run's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nas.reporting.markdown import markdown
from nas.reporting.report import Report
from nas.reporting.summary import summary
from nas.run import Run

VERSION = 1


def write_report(run: Run, report: Report) -> Path:
    """Write `report/` in the run's folder: Markdown, JSON and pictures.

    Returns:
        The path of `report.md`.
    """
    folder = run.folder / "report"
    folder.mkdir(exist_ok=True)
    pictures = _write_pictures(run, report, folder)
    values = {"version": VERSION, "summary": summary(report), **asdict(report)}
    run.store.write("report/report.json", _plain({**values, "pictures": list(pictures)}))
    (folder / "report.md").write_text(markdown(report, pictures))
    return folder / "report.md"


def _write_pictures(run: Run, report: Report, folder: Path) -> dict[str, str]:
    """Names of the pictures' files, with what they show."""
    from nas.pictures import front_picture, ranking_picture

    pictures = {"front.png": "the trials and their front"}
    front_picture(run).savefig(folder / "front.png", dpi=120)
    if report.ranking is not None:
        pictures["ranking.png"] = "networks with the supernet's weights, and once trained"
        metric, pairs = report.ranking.metric, report.ranking.pairs
        picture = ranking_picture(pairs, f"{metric} in the supernet", f"{metric} when trained")
        picture.savefig(folder / "ranking.png", dpi=120)
    return pictures


def _plain(value: Any) -> Any:
    """Plain JSON, null where a number is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

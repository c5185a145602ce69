"""Reports: the front of a run beside its dense twin, the dense parent and random networks."""

from nas.reporting.report import Plan, Report, make_report
from nas.reporting.summary import summary
from nas.reporting.write import write_report

__all__ = ["Plan", "Report", "make_report", "summary", "write_report"]

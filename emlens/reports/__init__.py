"""Reports: one HTML file drawn from one JSON file, figures, token views."""

from emlens.reports.document import ReportError, read_report
from emlens.reports.html import render_report
from emlens.reports.plots import plot
from emlens.reports.write import write_report

__all__ = ["ReportError", "plot", "read_report", "render_report", "write_report"]

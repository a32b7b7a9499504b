"""The report of a run: pictures and one HTML page, made from the run directory's files alone."""

from lobra_jax.report.page import Summary, Table, write_report

__all__ = ["Summary", "Table", "write_report"]

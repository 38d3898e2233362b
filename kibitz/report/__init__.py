"""Reads run folders and writes one self-contained HTML: what was done, the token heat-map, curves, costs.

The report knows files only: it imports no model, no torch, and opens no connection. Its page does not either.
"""

from kibitz.report.page import build, rollout_page

__all__ = ["build", "rollout_page"]

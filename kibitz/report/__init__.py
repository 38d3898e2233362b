"""Reads run folders and shows them: a self-contained HTML file of what was done, the token heat-map, curves and costs; a page
that follows runs (`watch`); a model card; and, by `%load_ext kibitz.report`, what a notebook shows.

The report knows files only: it imports no model, no torch, and opens no connection. Its pages do not either.
"""

from typing import Any

from kibitz.report.page import build, rollout_page

__all__ = ["build", "load_ipython_extension", "rollout_page"]


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython's `%load_ext kibitz.report`."""
    from kibitz.report.notebook import register

    register(shell)

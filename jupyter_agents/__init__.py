"""Claude agents in Jupyter: one capped container per user, an agent is a directory in it."""

from __future__ import annotations

import importlib
from typing import Any


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from .app import JupyterAgents

    return [{"module": "jupyter_agents.app", "app": JupyterAgents}]


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext jupyter_agents`: `%agent` and `%%agent`."""
    from .magic import load_ipython_extension

    load_ipython_extension(ipython)


def __getattr__(name: str) -> Any:
    if name == "panel":  # ipywidgets are imported by those who want a panel
        return importlib.import_module(".panel", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

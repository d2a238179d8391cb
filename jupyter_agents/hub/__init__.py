"""JupyterHub: one service owns the engine and all workspaces, users' servers forward to it."""

from .configure import configure

__all__ = ["configure"]

"""Fixtures of the tests of the API's clients; a module of them names this one in `pytest_plugins`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import TOKEN, Api, serving

from jupyter_agents.client import Client


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str) -> Path:
    """Jupyter's directories, and a workspace, for this test alone."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("JPY_PARENT_PID", "JUPYTER_SERVER_URL", "JUPYTER_AGENTS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    config = {"JupyterAgents": {"user": user}}
    (tmp_path / "JUPYTER_CONFIG_DIR" / "jupyter_server_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def served() -> Iterator[Api]:
    with serving() as served:
        yield served


@pytest.fixture
def client(served: Api) -> Client:
    """A client of the server, where there is an agent `bot`."""
    client = Client(served.url, TOKEN)
    client.create_agent("bot")
    return client

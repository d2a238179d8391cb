"""Real Docker, the real CLI, a real Jupyter server; only the model is scripted (demo/scripted_model.py)."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import NotFound
from jupyter_agents.docker_engine import LABEL

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
pytest_plugins = ["pytest_jupyter.jupyter_server"]

Api = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture(scope="session")
def docker_api() -> Iterator[docker.APIClient]:
    """Docker must be there: without it the suite fails rather than skips."""
    client = docker.from_env()
    yield client.api
    client.close()


@pytest.fixture(scope="session")
def model(docker_api: docker.APIClient) -> Iterator[str]:
    """The scripted model's address as the workspaces see it; the environment of this process leads there."""
    from demo import model_addresses  # type: ignore[import-not-found]

    hosts, name = model_addresses()
    command = [sys.executable, str(ROOT / "demo" / "scripted_model.py"), "--host", *hosts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = f"http://{name}:{process.stdout.readline().strip().rpartition(':')[2]}"
        settings = {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "scripted",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        os.environ.update(settings)
        yield url
        for key in settings:
            del os.environ[key]
        process.terminate()


@pytest.fixture
def user(docker_api: docker.APIClient) -> Iterator[str]:
    """A user of this test's own, of whom nothing is left."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    label = {"label": f"{LABEL}={name}"}
    for container in docker_api.containers(all=True, filters=label):
        docker_api.remove_container(container["Id"], force=True)
    for volume in docker_api.volumes(filters=label)["Volumes"] or []:
        try:
            docker_api.remove_volume(volume["Name"])
        except NotFound:
            pass


@pytest.fixture
def jp_server_config(user: str) -> dict[str, Any]:
    return {
        "ServerApp": {"jpserver_extensions": {"jupyter_agents": True}},
        "JupyterAgents": {"user": user},
    }


@pytest.fixture
def api(jp_fetch: Callable[..., Awaitable[Any]], model: str) -> Api:
    """`status, body = await api("POST", "agents", {"id": "x"})` on a server in this process; `data` is sent raw."""

    async def call(method: str, path: str, body: Any = None, data: Any = None, **kwargs: Any) -> tuple[int, Any]:
        kwargs["body"] = data
        if body is not None:
            kwargs["body"] = json.dumps(body)
            kwargs.setdefault("headers", {})["Content-Type"] = "application/json"
        response = await jp_fetch(
            "jupyter-agents",
            *path.split("/"),
            method=method,
            allow_nonstandard_methods=True,
            raise_error=False,
            request_timeout=120,
            **kwargs,
        )
        kind = response.headers.get("Content-Type", "")
        return response.code, json.loads(response.body) if "json" in kind and "nd" not in kind else response.body

    return call

"""A real JupyterHub with its proxy, users' servers as processes of their own, and the service on real Docker."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest
from docker.errors import NotFound

from .running import ROOT, Hub, User


@pytest.fixture(scope="session")
def start_hub(request: pytest.FixtureRequest, docker_api: docker.APIClient, model: str) -> Iterator[Callable[..., Hub]]:
    """Starts Hubs. At the end all are stopped and their workspaces removed; logs stay where a test has failed."""
    hubs: list[Hub] = []

    def start(
        python: str = sys.executable,
        service_config: str = "",
        hub_config: str = "",
        service_token: str | None = None,
        **environment: str,
    ) -> Hub:
        # Open to other system users, as a Hub's is and pytest's are not: what is in it must protect itself.
        directory = Path(tempfile.mkdtemp(prefix="jupyter-agents-hub-", dir="/tmp"))
        directory.chmod(0o755)
        hub = Hub(
            directory,
            python,
            service_config,
            {
                "PYTHONPATH": str(ROOT),
                "ANTHROPIC_BASE_URL": model,
                "ANTHROPIC_API_KEY": "sk-of-the-service",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                **environment,
            },
            hub_config,
            service_token,
        )
        hubs.append(hub)
        hub.start()
        return hub

    yield start
    for hub in hubs:
        hub.stop()
        remove_workspaces(docker_api, hub.deployment)
        if not request.session.testsfailed:
            shutil.rmtree(hub.directory, ignore_errors=True)


def remove_workspaces(docker_api: docker.APIClient, deployment: str) -> None:
    label = {"label": f"jupyter-agents.deployment={deployment}"}
    for container in docker_api.containers(all=True, filters=label):
        with contextlib.suppress(NotFound):
            docker_api.remove_container(container["Id"], force=True)
    for volume in docker_api.volumes(filters=label)["Volumes"] or []:
        with contextlib.suppress(NotFound):
            docker_api.remove_volume(volume["Name"], force=True)


@pytest.fixture(scope="session")
def hub(start_hub: Callable[..., Hub]) -> Hub:
    """The Hub that most tests share; each uses users of its own."""
    return start_hub()


@pytest.fixture(scope="module")
def deployment(hub: Hub) -> str:
    """Tells this Hub's containers and volumes from others."""
    return hub.deployment


@pytest.fixture(scope="module")
def users(hub: Hub) -> list[User]:
    """Three users whose servers run."""
    return hub.add_users("uma", "vic", "wes")

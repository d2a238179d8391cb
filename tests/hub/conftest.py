"""A real JupyterHub with its proxy, users' servers as processes of their own, and the service on real Docker."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator

import docker
import pytest
from docker.errors import NotFound

from .running import ROOT, SERVICE_CONFIG, Hub


@pytest.fixture(scope="session")
def deployment(docker_api: docker.APIClient) -> Iterator[str]:
    """A name for the containers of one test session; all of them are removed at its end, with their volumes."""
    name = f"hubtest-{secrets.token_hex(4)}"
    yield name
    label = {"label": f"jupyter-agents.deployment={name}"}
    for container in docker_api.containers(all=True, filters=label):
        with contextlib.suppress(NotFound):
            docker_api.remove_container(container["Id"], force=True)
    for volume in docker_api.volumes(filters=label)["Volumes"] or []:
        with contextlib.suppress(NotFound):
            docker_api.remove_volume(volume["Name"], force=True)


@pytest.fixture(scope="session")
def start_hub(tmp_path_factory: pytest.TempPathFactory, deployment: str, model: str) -> Iterator[Callable[..., Hub]]:
    """Starts Hubs; they are stopped at the end."""
    hubs: list[Hub] = []

    def start(python: str = sys.executable, service_config: str = "", **environment: str) -> Hub:
        hub = Hub(
            tmp_path_factory.mktemp("hub"),
            python,
            SERVICE_CONFIG.format(deployment=deployment) + service_config,
            {
                "PYTHONPATH": str(ROOT),
                "ANTHROPIC_BASE_URL": model,
                "ANTHROPIC_API_KEY": "sk-of-the-service",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                **environment,
            },
        )
        hubs.append(hub)
        hub.start()
        return hub

    yield start
    for hub in hubs:
        hub.stop()


@pytest.fixture(scope="session")
def hub(start_hub: Callable[..., Hub]) -> Hub:
    """The Hub that most tests share; each uses users of its own."""
    return start_hub()

"""The workspace image that `make test` has just built."""

from __future__ import annotations

import docker
import pytest
from docker.errors import ImageNotFound

from jupyter_agents.docker_engine import AGENTCTL_LABEL, AGENTCTL_SHA256
from jupyter_agents.errors import Unavailable
from jupyter_agents.image.build import build

IMAGE = "jupyter-agents:latest"


@pytest.fixture(scope="module")
def client(docker_api):
    client = docker.from_env()
    yield client
    client.close()


def test_what_is_in_it(client):
    script = """
        id -un; stat -c '%U %a' /workspace; stat -c '%U %a' /opt/jupyter-agents/agentctl
        claude --version; git --version; rg --version; python3 --version
        command -v node npm; find / -xdev -name '*ca-bundle*' 2>/dev/null; ls -A /tmp
    """
    said = client.containers.run(IMAGE, ["sh", "-c", script], remove=True, network_mode="none").decode().splitlines()
    assert said[:3] == ["claude", "root 711", "root 755"]
    assert "(Claude Code)" in said[3] and said[4].startswith("git ")
    # The last line is python3's: no Node, no CA bundle, nothing left in /tmp.
    assert said[-1].startswith("Python 3."), said


def test_its_label_tells_its_version(client):
    assert client.images.get(IMAGE).labels[AGENTCTL_LABEL] == AGENTCTL_SHA256


def test_a_base_that_cannot_be_had(client):
    with pytest.raises(Unavailable, match=r"The base image jupyter-agents/none:1 cannot be pulled") as caught:
        build(client, "jupyter-agents:never", base="jupyter-agents/none:1", log=lambda line: None)
    assert caught.value.reason == "build_failed"
    with pytest.raises(ImageNotFound):
        client.images.get("jupyter-agents:never")


def test_a_step_that_fails_is_told_with_what_it_said(client):
    with pytest.raises(Unavailable, match="could not be built") as caught:
        # The image as its own base: its user may not install anything.
        build(client, "jupyter-agents:never", base=IMAGE, log=lambda line: None)
    assert "Permission denied" in str(caught.value)

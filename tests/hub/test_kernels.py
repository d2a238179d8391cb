"""What a user's kernel can't get at, and what it doesn't notice."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from .helpers import container_of, events_of, service_secret
from .running import Hub, User, wait_for
from .spying import engines, find, ports, program

PORT = 8765  # of what an agent serves
CONTAINERS = "/proc/[0-9]*/root/opt/jupyter-agents/agentctl"


@pytest.fixture
def users(users: list[User]) -> Iterator[list[User]]:
    """The same, and they leave nothing to other tests."""
    yield users
    for user in users:
        user.client.stop_workspace(volume=True)


# jupyterhub_config.py leaves it to servers.
WITHOUT_PRIVILEGE = """
import ctypes
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()) == 0
"""
OWN_SECRETS = """
import ipykernel, json, os
key = ipykernel.get_connection_info(unpack=True)["key"].decode()
print(json.dumps([os.environ["JUPYTERHUB_API_TOKEN"], key]))
"""


@pytest.mark.skipif(
    os.geteuid() != 0,
    reason="only root can give servers a system user of their own; with the Hub's they may do what its service may",
)
def test_from_within_a_kernel_nothing_leads_out(hub: Hub, users: list[User], deployment: str, docker_api: Any) -> None:
    """Another user's container has an address that all of the machine can reach, so nothing may listen there but what
    an agent itself has started."""
    uma, vic, _ = users
    vic.client.create_agent("web")
    vic.client.start_run("web", f"[[run python3 -m http.server {PORT}]]")
    container = container_of(deployment, vic.name, docker_api)
    assert container
    address = container["NetworkSettings"]["Networks"]["jupyter-agents"]["IPAddress"]
    wait_for(lambda: ports(address) == [PORT], "the agent serves")
    with vic.kernel() as in_vics:
        vics_token, vics_key = json.loads(in_vics(OWN_SECRETS))
        secrets = {
            "the service's token": service_secret(hub),
            "the API key": "sk-of-the-service",
            "the administrator's token": hub.admin_token,
            "the token of vic's server": vics_token,
            "the key of vic's kernel": vics_key,
        }
        report = {
            "ids": "[*os.getresuid(), *os.getresgid(), *os.getgroups()]",
            "found": f"find(secrets, [{str(hub.directory)!r}])",
            "sockets": "sockets()",
            "engines": "engines()",
            "ports": f"ports({address!r})",
            "containers": f"glob.glob({CONTAINERS!r})",
        }
        spy = program(report, secrets, own="JUPYTERHUB_API_TOKEN", first=WITHOUT_PRIVILEGE)
        told = json.loads(uma.execute(spy))
        by_root = find(secrets, [str(hub.directory)])

    assert min(told["ids"]) > 0
    own = told["found"].pop("its own")
    assert len(own) > 1, "the kernel's and its child's"
    assert told["found"] == {name: [] for name in secrets}
    assert "/var/run/docker.sock" in told["sockets"] and told["engines"] == []
    assert told["ports"] == [PORT]
    assert told["containers"] == []
    # All of it is there, for root.
    assert all(by_root.values()), by_root
    assert "/var/run/docker.sock" in engines()
    assert glob.glob(CONTAINERS)


def test_a_killed_proxy_loses_nothing(hub: Hub, users: list[User]) -> None:
    """The Hub starts another. Whoever watches through it connects again, and goes on where it was."""
    uma = users[0]
    uma.client.create_agent("far")
    with uma.kernel() as execute:
        execute("kept = 42")
        run = uma.client.start_run("far", "[[slow 25 0.2]]")
        watching = uma.client.watch(run.id)
        seen = []
        while not events_of(seen):
            seen.append(next(watching))
        proxy = hub.proxy_process()
        proxy.kill()
        seen += watching
        assert hub.proxy_process().pid != proxy.pid
        assert run.refresh().status == "succeeded" and run.text.split()[-1] == "word024"
        assert events_of(seen) == list(uma.direct.events(run.id))
        assert execute("print(kept)") == "42\n"

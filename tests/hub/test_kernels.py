"""What a user's kernel can't get at, and what it doesn't notice."""

from __future__ import annotations

import glob
import inspect
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from .running import Hub, User, wait_for
from .test_service import container_of, events_of, service_secret

PORT = 8765  # of what an agent serves
CONTAINERS = "/proc/[0-9]*/root/opt/jupyter-agents/agentctl"


@pytest.fixture
def users(users: list[User]) -> Iterator[list[User]]:
    """The same, and they leave nothing to other tests."""
    yield users
    for user in users:
        user.client.stop_workspace(volume=True)


# The source of these functions is run in a kernel, too.


def find(secrets: dict[str, str], folder: str) -> dict[str, list[str]]:
    """Where a secret is to be read: in this machine's processes, in their open files, in the files below `folder`."""

    def paths() -> Iterator[str]:
        with subprocess.Popen(["sleep", "60"]) as child:  # another process that this one may look into
            for process in glob.glob("/proc/[0-9]*"):
                yield from (f"{process}/environ", f"{process}/cmdline", *glob.glob(f"{process}/fd/*"))
            child.kill()
        for where, _, names in os.walk(folder):
            yield from (os.path.join(where, name) for name in names)

    found: dict[str, list[str]] = {name: [] for name in secrets}
    for path in paths():
        try:
            if stat.S_ISREG(os.stat(path).st_mode):  # a pipe could keep us waiting
                with open(path, "rb") as file:
                    content = file.read(10_000_000)
                for name, secret in secrets.items():
                    if secret.encode() in content:
                        found[name].append(path)
        except OSError:
            pass
    return found


def sockets() -> list[str]:
    """The Unix sockets of this machine: those in its folders, those that the kernel knows, and Docker's own."""
    look = ["find", "/", "(", "-path", "/proc", "-o", "-path", "/sys", ")", "-prune", "-o", "-type", "s", "-print"]
    in_folders = subprocess.run(look, capture_output=True, text=True).stdout.splitlines()
    with open("/proc/net/unix") as table:
        lines = [line.rstrip().split(maxsplit=7) for line in table]
    known = [f"\0{line[7][1:]}" if line[7][0] == "@" else line[7] for line in lines[1:] if len(line) == 8]
    return sorted({*in_folders, *known, "/var/run/docker.sock"})


def leads_to_engine(address: str | int) -> bool:
    """Whether a socket, or a port of this machine, takes a connection and is an engine's by its name or its answer."""
    by_port = isinstance(address, int)
    with socket.socket(socket.AF_INET if by_port else socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(("127.0.0.1", address) if by_port else address)
        except OSError:
            return False
        try:
            probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            answer = probe.recv(4096).lower()
        except OSError:
            answer = b""
    return b"api-version:" in answer or "docker" in str(address) or "containerd" in str(address)


def ports(address: str) -> list[int]:
    """The ports at an address that take a connection."""

    def is_open(port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((address, port)) == 0

    return [port for port in range(1, 65536) if is_open(port)]


SPY = f"""
from __future__ import annotations
import ctypes, glob, json, os, socket, stat, subprocess
from collections.abc import Iterator

{"".join(map(inspect.getsource, (find, sockets, leads_to_engine, ports)))}

# The privilege that jupyterhub_config.py has left.
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()) == 0
given = json.loads(GIVEN)
asked = [*sockets(), 2375, 2376]
print(json.dumps({{
    "ids": [*os.getresuid(), *os.getresgid(), *os.getgroups()],
    "found": find({{**given["secrets"], "its own token": os.environ["JUPYTERHUB_API_TOKEN"]}}, given["folder"]),
    "asked": asked,
    "engines": [address for address in asked if leads_to_engine(address)],
    "ports": ports(given["address"]),
    "containers": glob.glob("{CONTAINERS}"),
}}))
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
        given = json.dumps({"secrets": secrets, "folder": str(hub.directory), "address": address})
        told = json.loads(uma.execute(f"GIVEN = {given!r}\n{SPY}"))
        by_root = find(secrets, str(hub.directory))

    assert min(told["ids"]) > 0
    own = told["found"].pop("its own token")
    assert len(own) > 1, "the kernel's and its child's"
    assert told["found"] == {name: [] for name in secrets}
    assert "/var/run/docker.sock" in told["asked"] and told["engines"] == []
    assert told["ports"] == [PORT]
    assert told["containers"] == []
    # All of it is there, for root.
    assert all(by_root.values()), by_root
    assert leads_to_engine("/var/run/docker.sock")
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

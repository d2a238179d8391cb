"""What somebody who wants out looks for. The source of these functions runs in kernels and in workspaces, too."""

from __future__ import annotations

import errno
import glob
import inspect
import os
import socket
import stat
import subprocess
from collections.abc import Iterator

WHERE = ["/etc", "/home", "/opt", "/run", "/srv", "/tmp", "/var", "/workspace"]


def find(secrets: dict[str, str], folders: list[str]) -> dict[str, list[str]]:
    """Where a secret is to be read: in this machine's processes, in their open files, in the files below `folders`."""

    def paths() -> Iterator[str]:
        with subprocess.Popen(["sleep", "60"]) as child:  # another process that this one may look into
            for process in glob.glob("/proc/[0-9]*"):
                yield from (f"{process}/environ", f"{process}/cmdline", *glob.glob(f"{process}/fd/*"))
            child.kill()
        for folder in folders:
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
    """The Unix sockets of this machine: those in its folders, and those that the kernel knows."""
    look = ["find", "/", "(", "-path", "/proc", "-o", "-path", "/sys", ")", "-prune", "-o", "-type", "s", "-print"]
    in_folders = subprocess.run(look, capture_output=True, text=True).stdout.splitlines()
    with open("/proc/net/unix") as table:
        lines = [line.rstrip().split(maxsplit=7) for line in table]
    known = [f"\0{line[7][1:]}" if line[7][0] == "@" else line[7] for line in lines[1:] if len(line) == 8]
    return sorted({*in_folders, *known})


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


def engines() -> list[str | int]:
    """The ways to an engine, also those that are usual but not to be seen."""
    return [address for address in (*sockets(), "/var/run/docker.sock", 2375, 2376) if leads_to_engine(address)]


def ports(address: str) -> list[int]:
    """The ports at an address that take a connection."""

    def is_open(port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((address, port)) == 0

    return [port for port in range(1, 65536) if is_open(port)]


def reaches(address: str, port: int) -> bool:
    """Whether anybody is there, if only to say no."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) in (0, errno.ECONNREFUSED)


FUNCTIONS = (find, sockets, leads_to_engine, engines, ports, reaches)


def program(report: dict[str, str], secrets: dict[str, str], own: str, first: str = "") -> str:
    """The source of a program that prints the values of these expressions as JSON.

    They may use the functions above, and `secrets`, which stand there backwards: the program itself is no find.
    Among those is what the program can read for certain, its `own` variable of that name. `first` is run before.
    """
    backwards = {name: secret[::-1] for name, secret in secrets.items()}
    values = "".join(f"    {name!r}: {expression},\n" for name, expression in report.items())
    return f"""
import errno, glob, json, os, socket, stat, subprocess
from collections.abc import Iterator

{"".join(map(inspect.getsource, FUNCTIONS))}

secrets = {{name: secret[::-1] for name, secret in {backwards!r}.items()}}
secrets["its own"] = os.environ[{own!r}]
{first}
print(json.dumps({{
{values}}}))
"""

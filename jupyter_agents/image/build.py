"""Build the workspace image, also where its Debian base cannot be pulled."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, ImageNotFound

from ..docker_engine import AGENTCTL, AGENTCTL_SHA256
from ..errors import Unavailable

DOCKERFILE = Path(__file__).parent / "Dockerfile"
BASE = "debian:bookworm-slim"
# What Debian's own slim image leaves out too, and device nodes, which the engine makes itself.
LEFT_OUT = ("dev", "var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")

Log = Callable[[str], None]


def build(client: docker.DockerClient, tag: str, base: str = BASE, ca_bundle: str = "", log: Log = print) -> None:
    """Build the workspace image as `tag`, giving each line of output to `log`.

    `ca_bundle` names a PEM file that the build trusts and the image does not keep; empty for none.
    Raises `Unavailable`, saying what to do, when a step fails, and docker's own errors when the engine is not reached.
    """
    _ensure_base(client.api, base, log)
    output = client.api.build(
        fileobj=io.BytesIO(_context(Path(ca_bundle).read_bytes() if ca_bundle else b"")),
        custom_context=True,
        tag=tag,
        buildargs={"BASE": base, "AGENTCTL_SHA256": AGENTCTL_SHA256},
        rm=True,
        forcerm=True,
        decode=True,
        timeout=None,  # a step may be silent for minutes
    )
    _follow(output, log)


def _context(ca_bundle: bytes) -> bytes:
    """The build context, a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode, data in (
            ("Dockerfile", 0o644, DOCKERFILE.read_bytes()),
            ("agentctl", 0o755, AGENTCTL.read_bytes()),
            ("ca-bundle.pem", 0o644, ca_bundle),
        ):
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = mode, len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _follow(output: Iterable[dict[str, Any]], log: Log) -> None:
    last = error = ""
    for message in output:  # to its end, which frees the connection
        error = error or message.get("error", "")
        for line in re.sub("\x1b\\[[0-9;]*m", "", message.get("stream", "")).splitlines():
            if line.strip():
                log(line)
                last = last if line.startswith(("Removing intermediate container", " --->")) else line
    if error:
        raise Unavailable(f"The image could not be built: {error}. It said: {last}", "build_failed")


def _ensure_base(api: docker.APIClient, base: str, log: Log) -> None:
    """Have `base` in the engine: what is there, else pulled, else a Debian made by debootstrap."""
    try:
        api.inspect_image(base)
        return
    except ImageNotFound:
        log(f"Pulling {base}")
    try:
        reason = "".join(message.get("error", "") for message in api.pull(base, stream=True, decode=True))
    except APIError as e:
        reason = str(e.explanation or e)
    if not reason:
        return
    log(f"It cannot be pulled: {reason}")
    debian = re.fullmatch(r"debian:([a-z]+)(-slim)?", base)
    if debian and os.getuid() == 0 and (shutil.which("debootstrap") or shutil.which("apt-get")):
        _bootstrap(api, debian[1], base, log)
    else:
        raise Unavailable(
            f"The base image {base} cannot be pulled ({reason}): load it into the engine by hand, name another base, "
            "or build as root on Debian or Ubuntu, where debootstrap makes it.",
            "build_failed",
        )


def _bootstrap(api: docker.APIClient, suite: str, base: str, log: Log) -> None:
    """Make a minimal Debian `suite` from its packages and import it as `base`."""
    if not shutil.which("debootstrap"):
        _run(["apt-get", "update"], log)
        _run(["apt-get", "install", "-y", "--no-install-recommends", "debootstrap", "debian-archive-keyring"], log)
    with tempfile.TemporaryDirectory(prefix="jupyter-agents-") as root:
        _run(["debootstrap", "--variant=minbase", suite, root], log)
        tar = ["tar", "-C", root, "-c", "--numeric-owner", *(f"--exclude=./{path}/*" for path in LEFT_OUT), "."]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as process:
            name, _, version = base.partition(":")
            api.import_image_from_stream(process.stdout, repository=name, tag=version, changes=['CMD ["bash"]'])
        if process.returncode:
            raise Unavailable(f"The base image could not be packed: tar exited {process.returncode}.", "build_failed")


def _run(command: list[str], log: Log) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            log(line.rstrip())
    if process.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed; the lines above it say why.", "build_failed")

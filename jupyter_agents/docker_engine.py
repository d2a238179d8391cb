"""Workspaces in Docker; the only module that imports docker."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import socket
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound
from docker.errors import NotFound as DockerNotFound
from docker.utils.socket import STDERR, frames_iter
from traitlets import Int, List, Unicode, default

from .engine import Container, Engine, Limits
from .errors import AgentsError, ContainerGone, DiskFull, Stuck, Unavailable

T = TypeVar("T")

AGENTCTL = Path(__file__).parent / "image" / "agentctl"
AGENTCTL_SHA256 = hashlib.sha256(AGENTCTL.read_bytes()).hexdigest()
LABEL = "jupyter-agents.user"
DEPLOYMENT_LABEL = "jupyter-agents.deployment"
AGENTCTL_LABEL = "jupyter-agents.agentctl"
IMAGE_LABEL = "jupyter-agents.image"
CHOICE = "workspace/.image"  # the folder is root's, so no agent can write it
CREATE_ATTEMPTS = 150
WRITE_SECONDS = 60  # for which a process may leave a piece of its input unread
FRAMES_AHEAD = 16  # read, and not yet taken by the event loop


def slug(user: str) -> str:
    """A name that Docker accepts: what is readable of the user's, and 8 hex digits that tell it from all others.

    Never change it: workspaces are found by label, but a name that some other user's rule could yield would collide.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", user.lower()).strip("-")[:32].strip("-") or "user"
    return f"{readable}-{hashlib.sha256(user.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def tar_of_root(*files: tuple[str, bytes | None, int]) -> bytes:
    """Tar of files that are root's: path, content (None for a folder), mode."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data, mode in files:
            info = tarfile.TarInfo(name)
            info.mode = mode
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def bootstrap() -> bytes:
    """Tar of what an image that isn't ours lacks: agentctl, and the mount point's mode."""
    return tar_of_root(
        ("opt/jupyter-agents", None, 0o755),
        ("opt/jupyter-agents/agentctl", AGENTCTL.read_bytes(), 0o755),
        ("workspace", None, 0o711),
    )


def _abandon(starting: Future[tuple[str, Any]]) -> None:
    """Let go of a process that nobody waits for any more; one that reads its stdin then ends."""
    if not starting.cancelled() and not starting.exception():
        starting.result()[1]._response.close()


class DockerExec:
    """A process started by `docker exec`, read by a thread of its own into a stream that holds it back when full."""

    def __init__(self, engine: DockerEngine, exec_id: str, sock: Any):
        self._engine = engine
        self._id = exec_id
        self._file = sock  # docker-py's wrapper keeps the response, and so the connection, alive
        self._socket: socket.socket = getattr(sock, "_sock", sock)
        self._socket.settimeout(None)
        self._stderr = bytearray()
        self._loop = asyncio.get_running_loop()
        self._may_read = threading.Event()
        self._may_read.set()
        self._closed = False
        self._ahead = threading.Semaphore(FRAMES_AHEAD)
        self._writer: ThreadPoolExecutor | None = None
        self.stdout = asyncio.StreamReader(limit=2**18)
        self.stdout.set_transport(self)  # type: ignore[arg-type]  # the part of a transport that it uses
        threading.Thread(target=self._read, name="docker-exec", daemon=True).start()

    @property
    def stderr(self) -> bytes:
        return bytes(self._stderr)

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def _read(self) -> None:
        try:
            for stream, data in frames_iter(self._file, tty=False):
                if stream == STDERR:
                    self._stderr += data
                    del self._stderr[:-8192]
                else:
                    while not self._ahead.acquire(timeout=1) and not self._closed:
                        pass  # the event loop is busy
                    self._call(self._feed, data)
                    self._may_read.wait()
        except (OSError, ValueError):
            pass  # the connection ended, or `close` ended it
        finally:
            self._call(self.stdout.feed_eof)
            self._shut_down()  # who still writes to what has ended would wait for ever
            self._file._response.close()

    def _feed(self, data: bytes) -> None:
        self._ahead.release()
        self.stdout.feed_data(data)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        if not self._closed:
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:  # the loop is closed: the server is going down
                self._closed = True

    async def write(self, data: bytes) -> None:
        if self._writer is None:  # a thread of its own: who doesn't read holds up nobody else
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="docker-write")
        try:
            written = self._loop.run_in_executor(self._writer, self._socket.sendall, data)
            await asyncio.wait_for(written, WRITE_SECONDS)
        except asyncio.TimeoutError:
            self._shut_down()
            raise Stuck from None
        except OSError:
            pass  # it ended without reading all; its exit code and stderr tell why

    async def wait(self) -> int:
        pause = 0.02
        while True:
            state = await self._engine.call(lambda api: api.exec_inspect(self._id))
            if not state["Running"]:
                return int(state["ExitCode"])
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, 1)

    def close(self) -> None:
        self._closed = True
        if self._writer:
            self._writer.shutdown(wait=False)
        self._may_read.set()
        self._shut_down()

    def _shut_down(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already


class DockerEngine(Engine):
    """One Docker engine, reached as the docker command would reach it (`DOCKER_HOST`, or the default socket)."""

    image = Unicode("jupyter-agents:latest", help="Image of the workspaces; `jupyter agents build` makes it.").tag(
        config=True
    )
    allowed_images = List(
        Unicode(), help="Images besides `image` that a user may choose for their workspace. Empty: none."
    ).tag(config=True)
    deployment = Unicode(
        help="Tells the workspaces of several Hubs and servers on one Docker engine apart: each sees only its own."
    ).tag(config=True)
    network = Unicode(
        "jupyter-agents",
        help="Bridge network of the workspaces, made when missing so that containers on it can't reach each other.",
    ).tag(config=True)
    ca_bundle = Unicode(
        help="CA bundle to build images with and to give to workspaces, for networks that intercept TLS. "
        "Default: what `SSL_CERT_FILE` names.",
    ).tag(config=True)
    workers = Int(64, help="Calls to the engine that may go on at the same time.").tag(config=True)

    _api: docker.APIClient | None = None

    @default("ca_bundle")
    def _default_ca_bundle(self) -> str:
        return os.environ.get("SSL_CERT_FILE", "")

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="docker")
        self._connecting = threading.Lock()

    @property
    def certificates(self) -> bytes:
        try:
            return Path(self.ca_bundle).read_bytes() if self.ca_bundle else b""
        except OSError as e:
            raise Unavailable(f"The CA bundle can't be read: {e}.", "ca_bundle_missing") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._api:
            self._api.close()

    # --- calls --------------------------------------------------------------------------------------------------

    async def call(self, function: Callable[[docker.APIClient], T]) -> T:
        """Call docker-py on a thread, and say what is wrong in words of ours."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, function)

    def _call(self, function: Callable[[docker.APIClient], T]) -> T:
        try:
            return function(self._connection())
        except DockerException as e:
            raise self._explain(e) from e
        except requests.exceptions.RequestException as e:
            raise self._unreachable(e) from e

    def _connection(self) -> docker.APIClient:
        with self._connecting:
            if self._api is None:
                client = docker.from_env(version="auto", timeout=60, max_pool_size=self.workers)
                self._api = client.api
            return self._api

    def _explain(self, error: DockerException) -> AgentsError:
        text = getattr(error, "explanation", None) or str(error)
        if isinstance(error, ImageNotFound):
            return self._no_image(self.image)
        if isinstance(error, APIError) and error.response is not None:
            if "no space left" in text.lower() or "disk quota exceeded" in text.lower():
                return DiskFull("The workspace's disk is full: delete files or agents to make room.", "disk_full")
            if error.status_code in (404, 409):
                return ContainerGone()
            return Unavailable(f"The Docker engine refused: {text[:300].strip()}.", "engine_unavailable")
        return self._unreachable(error)

    def _unreachable(self, error: Exception) -> AgentsError:
        self.log.debug("Docker can't be reached: %s", error)
        if "permission denied" in str(error).lower():
            return Unavailable(
                "You may not use the Docker engine: add yourself to the group `docker` and log in again, "
                "or ask your administrator.",
                "engine_forbidden",
                "sudo usermod -aG docker $USER",
            )
        return Unavailable(
            "Docker doesn't answer: start the Docker engine, or install it (https://docs.docker.com/engine/install/).",
            "engine_unavailable",
            "sudo systemctl start docker",
        )

    def _no_image(self, image: str) -> AgentsError:
        if image != self.image:
            others = ", ".join(other for other in self.images if other != image)
            return Unavailable(
                f"The image {image} is missing: choose another one ({others}), or ask your administrator to get it.",
                "image_missing",
            )
        return Unavailable(
            f"The workspace image {image} is missing: build it once.",
            "image_missing",
            "jupyter agents build",
        )

    # --- the engine ---------------------------------------------------------------------------------------------

    @property
    def images(self) -> list[str]:
        return list(dict.fromkeys([self.image, *self.allowed_images]))

    async def check(self) -> None:
        await self.call(lambda api: self._inspect(api, self.image))

    def _inspect(self, api: docker.APIClient, image: str) -> dict[str, Any]:
        try:
            about: dict[str, Any] = api.inspect_image(image)
        except DockerNotFound:
            raise self._no_image(image) from None
        return about

    async def containers(self, user: str | None = None) -> list[Container]:
        return await self.call(lambda api: [self._container(c) for c in self._find(api, user)])

    def _find(self, api: docker.APIClient, user: str | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api.containers(all=True, filters={"label": self._labels(user)})
        return found

    def _labels(self, user: str | None) -> list[str]:
        """A filter for what is this deployment's, and the user's."""
        return [f"{DEPLOYMENT_LABEL}={self.deployment}", LABEL if user is None else f"{LABEL}={user}"]

    def _name(self, user: str) -> str:
        return f"workspace-{slug(f'{self.deployment}/{user}' if self.deployment else user)}"

    def _container(self, found: dict[str, Any], present: tuple[str, str] | None = None, new: bool = False) -> Container:
        """`present`: name and id of the image that it should be made from."""
        image = found["Labels"].get(IMAGE_LABEL, self.image)
        return Container(
            id=found["Id"],
            name=found["Names"][0].lstrip("/") if found["Names"] else found["Id"][:12],
            user=found["Labels"][LABEL],
            image=image,
            running=found["State"] == "running",
            started=float(found["Created"]),  # it is started as soon as it is made, and never again
            outdated=present not in (None, (image, found["ImageID"])),
            new=new,
        )

    async def ensure(self, user: str, limits: Limits, image: str | None = None) -> Container:
        return await self.call(lambda api: self._ensure(api, user, limits, image))

    def _ensure(self, api: docker.APIClient, user: str, limits: Limits, image: str | None) -> Container:
        new = False
        if image:
            self._inspect(api, image)  # what is missing can't be chosen
        for _ in range(CREATE_ATTEMPTS):
            found = self._find(api, user)
            if found and found[0]["State"] == "running":
                if found[0]["Labels"].get(AGENTCTL_LABEL) != AGENTCTL_SHA256:
                    api.put_archive(found[0]["Id"], "/", bootstrap())
                chosen = self._choice(api, found[0]["Id"], image)
                return self._container(found[0], (chosen, self._inspect(api, chosen)["Id"]), new)
            if found and found[0]["State"] == "created" and time.time() - found[0]["Created"] < 10:
                time.sleep(0.1)  # another server is just making it
                continue
            for leftover in found:
                self._discard(api, leftover["Id"])
            try:
                volume = self._volume(api, user)
                made = self._create(api, user, limits, self.image, volume or self._name(user))
                chosen = self._choice(api, made, image)
                if chosen != self.image:
                    self._discard(api, made)
                    made = self._create(api, user, limits, chosen, volume or self._name(user))
                api.start(made)
                new = volume is None
            except DockerNotFound as e:
                if "network" not in str(e.explanation):
                    continue  # somebody removed it between the two calls
                self._make_network(api)
            except APIError as e:
                if e.status_code != 409:
                    raise
                time.sleep(0.1)  # another server was faster, or the engine is still removing the last one
        raise Unavailable(f"Docker keeps refusing to make the container {self._name(user)}.", "engine_unavailable")

    def _choice(self, api: docker.APIClient, container: str, image: str | None) -> str:
        """The image that the user chose, or chooses now; it is kept in the volume. No need that the container runs."""
        if image:
            api.put_archive(container, "/", tar_of_root((CHOICE, image.encode(), 0o600)))
            return image
        if not self.allowed_images:
            return self.image
        try:
            stream, _ = api.get_archive(container, f"/{CHOICE}", chunk_size=512)
            with tarfile.open(fileobj=io.BytesIO(b"".join(islice(stream, 16))), mode="r:") as tar:
                file = next((tar.extractfile(member) for member in tar if member.isreg()), None)
                chosen = file.read() if file else b""
        except (DockerNotFound, tarfile.TarError):
            return self.image
        return next((image for image in self.images if image.encode() == chosen), self.image)

    def _create(self, api: docker.APIClient, user: str, limits: Limits, image: str, volume: str) -> str:
        about = self._inspect(api, image)
        labels = {LABEL: user, DEPLOYMENT_LABEL: self.deployment}
        api.create_volume(volume, labels=labels)
        made = api.create_container(
            image,
            # Somebody whom no agent is and whose files nobody has; what works here is started by exec.
            user="65534:65534",
            command=["tail", "-f", "/dev/null"],
            entrypoint=[],
            name=self._name(user),
            hostname="workspace",
            labels={**labels, AGENTCTL_LABEL: AGENTCTL_SHA256, IMAGE_LABEL: image},
            host_config=api.create_host_config(
                mem_limit=limits.memory_bytes,
                memswap_limit=limits.memory_bytes,  # by default Docker allows as much swap again
                nano_cpus=int(limits.cpu * 1e9),
                pids_limit=limits.pids,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                init=True,
                network_mode=self.network,
                mounts=[docker.types.Mount("/workspace", volume, type="volume")],
                log_config=docker.types.LogConfig(type="none"),
            ),
        )["Id"]
        own = (about["Config"].get("Labels") or {}).get(AGENTCTL_LABEL)
        if own != AGENTCTL_SHA256:
            api.put_archive(made, "/", bootstrap())
        return str(made)

    def _volume(self, api: docker.APIClient, user: str) -> str | None:
        found = api.volumes(filters={"label": self._labels(user)})["Volumes"] or []
        return str(found[0]["Name"]) if found else None

    def _make_network(self, api: docker.APIClient) -> None:
        api.create_network(
            self.network,
            driver="bridge",
            options={"com.docker.network.bridge.enable_icc": "false"},
            labels={"jupyter-agents": ""},
        )

    def _discard(self, api: docker.APIClient, container: str) -> None:
        try:
            api.remove_container(container, force=True)
        except DockerNotFound:
            pass
        except APIError as e:
            if e.status_code != 409:  # it is being removed already
                raise

    async def users(self) -> list[str]:
        volumes = await self.call(lambda api: api.volumes(filters={"label": self._labels(None)})["Volumes"] or [])
        return [volume["Labels"][LABEL] for volume in volumes]

    async def remove(self, user: str, volume: bool = False) -> None:
        await self.call(lambda api: self._remove(api, user, volume))

    def _remove(self, api: docker.APIClient, user: str, volume: bool) -> None:
        for container in self._find(api, user):
            self._discard(api, container["Id"])
        name = self._volume(api, user) if volume else None
        if name:
            try:
                api.remove_volume(name)
            except APIError as e:
                if e.status_code != 409:
                    raise
                raise Unavailable(
                    "The files are in use by another container, such as a backup: try again later.", "volume_in_use"
                ) from e

    async def exec(self, container: Container, argv: list[str], uid: int) -> DockerExec:
        def start(api: docker.APIClient) -> tuple[str, Any]:
            made = api.exec_create(container.id, argv, stdin=True, user=f"{uid}:{uid}")["Id"]
            return made, api.exec_start(made, socket=True)

        starting = self._pool.submit(self._call, start)
        try:
            return DockerExec(self, *await asyncio.wrap_future(starting))
        except asyncio.CancelledError:
            starting.add_done_callback(_abandon)
            raise

    async def put(self, container: Container, tar: bytes) -> None:
        await self.call(lambda api: api.put_archive(container.id, "/", tar))

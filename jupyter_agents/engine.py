"""What an engine must do: start one container for a user, execute in it, put files in it. Nothing above needs more."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from traitlets.config import LoggingConfigurable


@dataclass(frozen=True)
class Limits:
    """Caps of one user's workspace; sizes in bytes."""

    memory_bytes: int
    memory_warning_bytes: int
    cpu: float
    pids: int
    agents: int
    runs: int


@dataclass(frozen=True)
class Container:
    """A workspace's container. `image`: name of what it was made from; `outdated`: that is another one by now.

    `new`: just made, and on a volume that was empty.
    """

    id: str
    name: str
    user: str
    image: str
    running: bool
    started: float
    outdated: bool = False
    new: bool = False


class Exec(Protocol):
    """A process in a container. It must not be told by the end of its stdin: not every engine can do that."""

    stdout: asyncio.StreamReader

    @property
    def stderr(self) -> bytes:
        """The last 8 KiB of its standard error."""

    async def write(self, data: bytes) -> None:
        """Send to its stdin, waiting while it doesn't read; a process that has ended takes nothing, silently."""

    async def wait(self) -> int:
        """Exit code, once stdout has ended. Raises `ContainerGone` when the container went with it."""

    def close(self) -> None:
        """Let go of it. The process itself may go on."""


class Engine(LoggingConfigurable):
    """Where workspaces live. All methods raise `Unavailable` when the engine can't be reached or lacks the image."""

    @property
    def certificates(self) -> bytes:
        """The CA bundle that runs need in the workspaces' network, in PEM; empty for none."""
        return b""

    @property
    @abstractmethod
    def images(self) -> list[str]:
        """Names of the images that users may choose from, the one that they have by default first."""

    @abstractmethod
    async def check(self) -> None:
        """Raise what is wrong with the engine or the image, if anything."""

    @abstractmethod
    async def ensure(self, user: str, limits: Limits, image: str | None = None) -> Container:
        """The user's running container: the one that there is, or a new one on the user's volume.

        `image`: one of `images`, which is the user's choice from now on. It is kept in the volume, and holds as long as
        it is one of `images`; a container that runs already is then `outdated`.
        """

    @abstractmethod
    async def containers(self, user: str | None = None) -> list[Container]:
        """Containers of all users, or of one."""

    @abstractmethod
    async def users(self) -> list[str]:
        """All who have a workspace here, be it only the files of one."""

    @abstractmethod
    async def remove(self, user: str, volume: bool = False) -> None:
        """Remove the user's container, and the volume if told so. Nothing happens when there is none."""

    @abstractmethod
    async def exec(self, container: Container, argv: list[str], uid: int) -> Exec:
        """Start a process as `uid:uid`. Raises `ContainerGone`. `argv` may be logged: no secrets, no user's values."""

    @abstractmethod
    async def put(self, container: Container, tar: bytes) -> None:
        """Unpack a tar archive at `/`, with its owners and modes. Raises `ContainerGone`, `DiskFull`."""

    def close(self) -> None:
        """Free what the engine holds in this process; containers stay."""

"""The way into a user's container, which is started or adopted when it is needed."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from . import agentctl
from .engine import Container, Exec
from .errors import AgentsError, Conflict, ContainerGone, Stuck, TooLarge, Unavailable
from .settings import Settings

Message = dict[str, Any]
T = TypeVar("T")

# An agent can halt what is done as its uid, so nothing waits for that without end.
ANSWER_SECONDS = 60
MAX_CALLS = 64  # of one user at the same time, of which so many are just being started:
MAX_STARTS = 8


class Link(ABC):
    """One user's container, and requests to agentctl in it."""

    def __init__(self, user: str, settings: Settings):
        self.user = user
        self.settings = settings
        self.engine = settings.engine
        self.log = settings.log
        self.limits = settings.limits_for(user)
        self.container: Container | None = None
        self.problem: AgentsError | None = None
        self.closed: AgentsError | None = None  # why this workspace is not to be used any more
        self._starting = False
        self._wanted = False
        self._lock = asyncio.Lock()
        self._execs = 0
        self._starts = asyncio.Semaphore(MAX_STARTS)
        self._used = time.monotonic()

    @property
    def name(self) -> str:
        return self.container.name if self.container else f"the workspace of {self.user!r}"

    def _audit(self, action: str, **about: str) -> None:
        self.settings.audit({"action": action, "user": self.user, **about})

    @abstractmethod
    def _changed(self) -> None:
        """Something that is shown has changed."""

    @abstractmethod
    def _tell(self, message: Message) -> None:
        """Send a message to all that listen."""

    @abstractmethod
    async def _take(self, sample: agentctl.Sample, everything: bool = False) -> None:
        """Bring what is known of the container in line with a sample."""

    @abstractmethod
    async def refresh(self, older_than: float = 0) -> None:
        """Take a sample, unless that was done less than `older_than` seconds ago."""

    async def connect(self) -> Container:
        """The running container, started or adopted when need be."""
        if self.closed:
            raise self.closed
        self._wanted = True
        self._used = time.monotonic()
        # Who asked may go meanwhile, but not the engine's thread that makes the container: the lock is held as long.
        starting = asyncio.ensure_future(self._connect())
        starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(starting)

    async def _connect(self) -> Container:
        async with self._lock:
            if self.container is None:
                await self._begin()
            assert self.container is not None
            return self.container

    async def adopt(self) -> None:
        """Take over the container if one runs, and start none: it may just have been stopped."""
        async with self._lock:
            found = self.container is None and await self.engine.containers(self.user)
            if found and any(container.running for container in found):
                await self._begin()

    async def _begin(self) -> None:
        self._starting = True
        self._changed()
        try:
            await self._start()
            self.problem = None
        except AgentsError as e:
            self._set_problem(e)
            raise
        finally:
            self._starting = False
            self._changed()

    async def _start(self) -> None:
        self.limits = self.settings.limits_for(self.user)  # others may hold by now
        container = await self.engine.ensure(self.user, self.limits)
        sample = agentctl.Sample() if container.new else await self._look_into(container)
        if container.outdated and not sample.supervisors:
            await self.engine.remove(self.user)
            container = await self.engine.ensure(self.user, self.limits)
            sample = await self._look_into(container)
        self.container = container
        try:
            await self._take(sample, everything=True)
        except BaseException:
            self.container = None
            raise

    def _set_problem(self, error: AgentsError) -> None:
        if self.problem is None or self.problem.message != error.message:
            self.log.warning("%s: %s", self.name, error)
            self.settings.engine_failed(error)
        self.problem = error
        if isinstance(error, Unavailable):
            self._lost()
        self._changed()

    def _lost(self) -> None:
        """The container is not to be reached; what became of its runs is seen when one is there again."""
        self.container = None
        self._changed()

    async def _look_into(self, container: Container) -> agentctl.Sample:
        async with self._request(container, "sample", 0, {}) as process:
            return agentctl.Sample.parse((await self._all(process)).decode("utf-8", "replace"))

    @asynccontextmanager
    async def _request(
        self, container: Container, verb: str, uid: int, values: dict[str, object]
    ) -> AsyncIterator[Exec]:
        async with self._starts:
            process = await self.engine.exec(container, ["sh", agentctl.PATH, verb], uid)
        try:
            await process.write(agentctl.request({"agent": "", "run": ""} | values))
            yield process
        finally:
            process.close()

    @asynccontextmanager
    async def _exec(self, verb: str, uid: int, **values: object) -> AsyncIterator[Exec]:
        """Ask agentctl for something, and once more where the container has just gone. But for a watch, it keeps it."""
        counted = verb != "watch"
        if self._execs >= MAX_CALLS:
            raise Conflict(f"{MAX_CALLS} calls of yours are open, which is the limit: close some.", "too_many_calls")
        self._execs += counted
        try:
            async with AsyncExitStack() as stack:
                try:
                    request = self._request(await self.connect(), verb, uid, values)
                    process = await stack.enter_async_context(request)
                except ContainerGone:
                    self._lost()
                    request = self._request(await self.connect(), verb, uid, values)
                    process = await stack.enter_async_context(request)
                yield process
        finally:
            self._execs -= counted
            self._used = time.monotonic()

    async def _in_time(self, what: Awaitable[T], seconds: float | None = None) -> T:
        """Raises `Stuck` when it takes longer."""
        try:
            return await asyncio.wait_for(what, seconds or ANSWER_SECONDS)
        except asyncio.TimeoutError:
            raise Stuck from None

    async def _all(self, process: Exec, most: int = 64 * 2**20) -> bytes:
        """All that it prints, and an error if it fails."""
        return await self._in_time(self._read_all(process, most))

    async def _read_all(self, process: Exec, most: int) -> bytes:
        out = bytearray()
        while chunk := await process.stdout.read(2**16):
            out += chunk
            if len(out) > most:
                raise TooLarge(f"The answer is larger than {most // 2**10} KB.", "too_large")
        await self._check(process)
        return bytes(out)

    async def _check(self, process: Exec) -> None:
        code = await self._in_time(process.wait())
        if code:
            raise agentctl.error(code, process.stderr)

"""A user's agents: their directories, variables and files."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from . import agentctl, environment
from .engine import Exec
from .errors import BadRequest, Conflict, ContainerGone, NotFound, TooLarge
from .link import Link
from .settings import Settings

AGENT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
# A person with the same uid on the engine's machine could look into an agent's processes: these are in no system's use
# (https://systemd.io/UIDS-GIDS), and below 65536, which is all that a user namespace has.
FIRST_UID, UIDS = 60706, 478
SHARED_UID = 1000
MAX_ENV = 2**17  # which takes most of a second to parse
FRESH_SECONDS = 5
WIPE_SECONDS = 600


def check_agent_id(agent_id: str) -> None:
    if not AGENT_ID.fullmatch(agent_id):
        message = "An agent's name has 1 to 32 of a-z, 0-9 and `-`, and does not begin with `-`."
        raise BadRequest(message, "bad_agent_id")


def too_many_variables() -> TooLarge:
    return TooLarge(f"The variables of an agent, its `.env`, may take {MAX_ENV // 1024} KiB together.", "too_large")


@dataclass
class Agent:
    id: str
    uid: int
    created: float = field(default_factory=time.time)
    env: list[str] = field(default_factory=list)
    made: float = -math.inf  # when this process made it, by the monotonic clock
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Agents(Link):
    """Agents by id. Everything in an agent's directory is done as the agent's uid, so the kernel says what may be."""

    def __init__(self, user: str, settings: Settings):
        super().__init__(user, settings)
        self.agents: dict[str, Agent] = {}

    def agent(self, agent_id: str) -> Agent:
        """Raises `BadRequest` for an id that none can have, `NotFound` for one that none has."""
        check_agent_id(agent_id)
        if agent_id not in self.agents:
            raise NotFound(
                f"There is no agent `{agent_id}`: create it, or look at the list of agents.", "unknown_agent"
            )
        return self.agents[agent_id]

    async def _ask(self, verb: str, agent: Agent, data: bytes = b"", most: int = 64 * 2**20, **values: object) -> str:
        async with self._exec(verb, agent.uid, agent=agent.id, size=len(data), **values) as process:
            if data:
                await process.write(data)
            return (await self._all(process, most)).decode("utf-8", "replace")

    async def create_agent(self, agent_id: str) -> Agent:
        check_agent_id(agent_id)
        await self.refresh(FRESH_SECONDS)
        if agent_id in self.agents:
            raise Conflict(f"There is an agent `{agent_id}` already: choose another name.", "agent_exists")
        if len(self.agents) >= self.limits.agents:
            raise Conflict(
                f"You have {len(self.agents)} agents, which is the limit: remove one that you no longer need.",
                "too_many_agents",
            )
        agent = self.agents[agent_id] = Agent(agent_id, self._new_uid(agent_id))
        try:
            async with agent.lock:
                tar = agentctl.agent_tar(agent_id, agent.uid)
                try:
                    await self.engine.put(await self.connect(), tar)
                except ContainerGone:
                    self._lost()
                    await self.engine.put(await self.connect(), tar)
                    self.agents[agent_id] = agent
            agent.made = time.monotonic()
        except BaseException:
            self.agents.pop(agent_id, None)
            raise
        self._audit("agent_created", agent=agent_id)
        self._changed()
        return agent

    def _new_uid(self, agent_id: str) -> int:
        """Made from the name, so that two servers at once agree; the next free one when it is taken."""
        if not self.settings.isolate_agents:
            return SHARED_UID
        taken = {agent.uid for agent in self.agents.values()}
        uid = int(hashlib.sha256(agent_id.encode()).hexdigest(), 16) % UIDS
        while FIRST_UID + uid in taken:
            uid = (uid + 1) % UIDS
        return FIRST_UID + uid

    async def remove_agent(self, agent_id: str) -> None:
        """Delete its directory."""
        await self.connect()
        agent = self.agent(agent_id)
        async with agent.lock:
            # An agent that opened its directory to others may have files of theirs in it, and they in turn its own.
            for owner in 2 * sorted(self.agents.values(), key=lambda other: other is not agent):
                async with self._exec("wipe", owner.uid, agent=agent_id) as process:
                    await self._in_time(process.wait(), WIPE_SECONDS)
                async with self._exec("discard", 0, agent=agent_id) as process:
                    if not await self._in_time(process.wait()):
                        break
            else:
                raise Conflict(f"The directory of `{agent_id}` can't be emptied; try again.", "agent_busy")
        self._audit("agent_removed", agent=agent_id)
        self._changed()

    # --- an agent's variables -----------------------------------------------------------------------------------

    async def set_env(self, agent_id: str, changes: dict[str, str | None]) -> list[str]:
        """Set variables, or unset those whose value is None; the names that there are now."""
        await self.connect()
        agent = self.agent(agent_id)
        for name, value in changes.items():
            if value is not None and not environment.settable(name):
                raise BadRequest(f"`{name[:40]}` can't be the name of a variable.", "bad_request")
            if value and re.search("[\0\ud800-\udfff]", value):
                raise BadRequest(f"The value of `{name}` holds NUL or half a character.", "bad_request")
        async with agent.lock:
            # Parsed on a thread, since that may take long.
            text = await asyncio.to_thread(environment.edit, await self._dotenv(agent), changes)
            data = text.encode()
            if len(data) > MAX_ENV:
                raise too_many_variables()
            await self._ask("setenv", agent, data)
            agent.env = sorted(await asyncio.to_thread(environment.read, text))
        return agent.env

    async def env_names(self, agent_id: str) -> list[str]:
        await self.connect()
        agent = self.agent(agent_id)
        agent.env = sorted(await asyncio.to_thread(environment.read, await self._dotenv(agent)))
        return agent.env

    async def _dotenv(self, agent: Agent) -> str:
        try:
            return await self._ask("getenv", agent, most=MAX_ENV)
        except TooLarge:
            raise too_many_variables() from None

    # --- an agent's files ---------------------------------------------------------------------------------------

    def path(self, path: str, root: bool = False) -> str:
        """A path within an agent, tidied; `root` says whether the agent's directory itself will do."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        # Names that aren't UTF-8 have \udc80 to \udcff; no name has any other half of a character.
        odd = re.search("[\0\ud800-\udc7f\udd00-\udfff]", path)
        long = len(path) > 4096 or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        if ".." in parts or odd or long or not (parts or root):
            raise BadRequest(
                "A path is relative to the agent's directory, names a file in it and has no `..`.", "bad_path"
            )
        return "/".join(parts)

    @asynccontextmanager
    async def open_file(self, agent_id: str, path: str) -> AsyncIterator[tuple[int, Exec] | list[dict[str, Any]]]:
        """A file's size and the process that prints it, or a folder's entries."""
        await self.connect()
        agent, path = self.agent(agent_id), self.path(path, root=True)
        async with self._exec("get", agent.uid, agent=agent_id, path=path) as process:
            kind, _, size = (await self._in_time(process.stdout.readline())).decode().partition(" ")
            if kind == "f":
                yield int(size), process
            else:
                yield agentctl.entries((await self._all(process)).decode("utf-8", "surrogateescape"), path)

    @asynccontextmanager
    async def open_tar(self, agent_id: str, path: str) -> AsyncIterator[Exec]:
        """The process that prints a folder as tar."""
        await self.connect()
        agent, path = self.agent(agent_id), self.path(path, root=True)
        async with self._exec("archive", agent.uid, agent=agent_id, path=path) as process:
            if not await self._in_time(process.stdout.readline()):
                await self._check(process)
            yield process

    @asynccontextmanager
    async def receive_file(self, agent_id: str, path: str, size: int) -> AsyncIterator[Exec]:
        """The process to write `size` bytes to, which `stored` then concludes. The file appears when it is complete."""
        await self.connect()
        agent, path = self.agent(agent_id), self.path(path)
        if size > self.settings.max_upload:
            raise TooLarge(f"A file may have {self.settings.max_upload // 2**20} MB at most.", "too_large")
        async with self._exec("put", agent.uid, agent=agent_id, path=path, size=size) as process:
            if not await self._in_time(process.stdout.readline()):
                await self._check(process)
            yield process

    async def stored(self, path: str, process: Exec) -> dict[str, Any]:
        return self._entry(path, (await self._all(process)).decode("utf-8", "surrogateescape"))

    def _entry(self, path: str, text: str) -> dict[str, Any]:
        path = self.path(path)
        return agentctl.entries(text, path.rpartition("/")[0])[0] | {"name": path.rpartition("/")[2], "path": path}

    async def make_folder(self, agent_id: str, path: str) -> dict[str, Any]:
        await self.connect()
        return self._entry(path, await self._ask("folder", self.agent(agent_id), path=self.path(path)))

    async def move_file(self, agent_id: str, path: str, to: str) -> dict[str, Any]:
        await self.connect()
        agent = self.agent(agent_id)
        return self._entry(to, await self._ask("move", agent, path=self.path(path), to=self.path(to)))

    async def delete_file(self, agent_id: str, path: str) -> None:
        await self.connect()
        await self._ask("remove", self.agent(agent_id), path=self.path(path))

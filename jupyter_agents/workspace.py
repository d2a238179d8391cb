"""The core: a user's workspace, its agents and runs.

State lives in the agents' directories; what is kept here is a cache of it, and is read again whenever the container is
another one or shows something that the cache doesn't know.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import shlex
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from traitlets import Bool, Dict, Float, Int, List, Type, Unicode
from traitlets.config import LoggingConfigurable

from . import agentctl, claude, environment
from .docker_engine import DockerEngine
from .engine import Container, Engine, Exec, Limits
from .errors import AgentsError, BadRequest, Conflict, ContainerGone, NotFound, TooLarge, Unavailable
from .runs import SHOWN_OF_PROMPT, Run, new_id

AGENT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
FIRST_UID, UIDS = 10000, 50000  # below 65536, which is all that a user namespace has
SHARED_UID = 1000
MAX_PROMPT = 2**20
MAX_ENV = 2**20
MAX_DIFF = 8 * 2**20
MAX_FOLLOWERS = 64
SAMPLE_SECONDS = 2
FRESH_SECONDS = 3 * SAMPLE_SECONDS

Message = dict[str, Any]
Listener = Callable[[Message], None]


def check_agent_id(agent_id: str) -> None:
    if not AGENT_ID.fullmatch(agent_id):
        message = "An agent's name has 1 to 32 of a-z, 0-9 and `-`, and does not begin with `-`."
        raise BadRequest(message, "bad_agent_id")


@dataclass
class Agent:
    id: str
    uid: int
    created: float = field(default_factory=time.time)
    env: list[str] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Workspaces(LoggingConfigurable):
    """All workspaces that this process serves, by user name, and what applies to all of them."""

    engine_class = Type(DockerEngine, Engine, help="Where workspaces live.").tag(config=True)
    memory_limit = Int(2**30, help="Memory of a workspace, in bytes; no swap comes on top.").tag(config=True)
    memory_warning = Int(800 * 2**20, help="Warn from this use of memory on, in bytes.").tag(config=True)
    cpu_limit = Float(1.0, help="CPUs of a workspace.").tag(config=True)
    pids_limit = Int(512, help="Processes and threads of a workspace.").tag(config=True)
    max_agents = Int(10, help="Agents of a user.").tag(config=True)
    max_runs = Int(3, help="Runs of a user at the same time.").tag(config=True)
    isolate_agents = Bool(
        True,
        help="Give each agent a uid of its own, so that a user's agents can't read each other's files. "
        "If False, all new agents share the uid of the image's user `claude`.",
    ).tag(config=True)
    cleanup_grace = Float(
        120, help="Seconds for which an idle workspace that nobody watches is kept before its container is removed."
    ).tag(config=True)
    orphan_age = Float(
        24 * 3600, help="At start, remove workspaces without an active run that are older than this, in seconds."
    ).tag(config=True)
    run_timeout = Float(4 * 3600, help="Seconds that a run may take unless it asks for another time; 0: any.").tag(
        config=True
    )
    run_idle_timeout = Float(1800, help="End a run after this many seconds without any event; 0: never.").tag(
        config=True
    )
    run_linger = Float(10, help="End a run this many seconds after Claude's result if it doesn't end itself.").tag(
        config=True
    )
    max_upload = Int(10 * 2**30, help="Largest file that can be uploaded, in bytes.").tag(config=True)
    pass_environment = List(
        Unicode(),
        environment.PASSED_ON,
        help="Names of variables of the server's environment that runs get. Nothing else of it reaches them.",
    ).tag(config=True)
    environment = Dict(
        Unicode(),
        help="Further variables for all runs. They win over the server's; an agent's own `.env` wins over all.",
    ).tag(config=True)

    def __init__(self, audit: Callable[[dict[str, Any]], None] = lambda event: None, **kwargs: Any):
        super().__init__(**kwargs)
        self.audit = audit
        self.engine: Engine = self.engine_class(parent=self)  # type: ignore[abstract]
        self._workspaces: dict[str, Workspace] = {}
        self._housekeeper: asyncio.Task[None] | None = None

    def limits_for(self, user: str) -> Limits:
        return Limits(
            memory_bytes=self.memory_limit,
            memory_warning_bytes=self.memory_warning,
            cpu=self.cpu_limit,
            pids=self.pids_limit,
            agents=self.max_agents,
            runs=self.max_runs,
        )

    def get(self, user: str) -> Workspace:
        """The user's workspace. Nothing is started."""
        if user not in self._workspaces:
            self._workspaces[user] = Workspace(user, self)
        return self._workspaces[user]

    def __iter__(self) -> Iterator[Workspace]:
        return iter(list(self._workspaces.values()))

    def start(self, user: str | None = None) -> None:
        """Begin to look after workspaces, and reap orphans: of one user, or of all."""
        self._housekeeper = asyncio.get_running_loop().create_task(self._keep_house(user))

    async def stop(self) -> None:
        """Remove idle workspaces. One with an active run stays, and is adopted by whoever comes next."""
        if self._housekeeper:
            self._housekeeper.cancel()
        await asyncio.gather(*(workspace.leave() for workspace in self))
        self.engine.close()

    async def _keep_house(self, user: str | None) -> None:
        try:
            await self._reap(user)
        except AgentsError as e:
            self.log.warning("Orphaned workspaces can't be looked for: %s", e)
        while True:
            await asyncio.sleep(min(10, max(0.1, self.cleanup_grace / 4)))
            await asyncio.gather(*(self._look_after(workspace) for workspace in self))

    async def _look_after(self, workspace: Workspace) -> None:
        try:
            await workspace.look_after()
        except AgentsError as e:
            self.log.warning("%s: %s", workspace.name, e)
        except Exception:
            # One workspace's bad luck must not end the care for all others.
            self.log.exception("Looking after %s failed", workspace.name)

    async def _reap(self, user: str | None) -> None:
        for container in await self.engine.containers(user):
            workspace = self.get(container.user)
            if time.time() - container.started > self.orphan_age and not workspace.watched:
                self.log.info("Reaping the orphan %s, unless it has an active run", container.name)
                await workspace.remove_if_idle(container)


class Workspace:
    """One user's container, agents and runs."""

    def __init__(self, user: str, owner: Workspaces):
        self.user = user
        self.owner = owner
        self.engine = owner.engine
        self.log = owner.log
        self.limits = owner.limits_for(user)
        self.container: Container | None = None
        self.problem: AgentsError | None = None
        self.memory: dict[str, Any] | None = None
        self.agents: dict[str, Agent] = {}
        self.runs: dict[str, Run] = {}
        self._starting = False
        self._wanted = False
        self._lock = asyncio.Lock()
        self._listeners: set[Listener] = set()
        self._following: dict[str, asyncio.Task[None]] = {}
        self._followers = 0
        self._reserved: set[str] = set()  # ids of runs whose supervisor may not be there yet
        self._ended: dict[str, asyncio.Event] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._execs = 0
        self._used = time.monotonic()
        self._sampled = 0.0
        self._warned = False
        self._announcing = False

    # --- state --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.container.name if self.container else f"the workspace of {self.user!r}"

    @property
    def watched(self) -> bool:
        return bool(self._listeners)

    @property
    def active_runs(self) -> list[Run]:
        return [run for run in self.runs.values() if run.active]

    def to_dict(self) -> dict[str, Any]:
        """The API's Workspace."""
        state = "ready" if self.container else "starting" if self._starting else "stopped"
        limits = self.limits
        return {
            "name": self.container.name if self.container else "",
            "user": self.user,
            "state": "unavailable" if self.problem and state == "stopped" else state,
            "limits": {
                "memory_bytes": limits.memory_bytes,
                "memory_warning_bytes": limits.memory_warning_bytes,
                "cpu": limits.cpu,
                "agents": limits.agents,
                "runs": limits.runs,
            },
            "memory": self.memory,
            "agents": len(self.agents) if self.container else None,
            "active_runs": len(self.active_runs),
            "started": self.container.started if self.container else None,
            "problem": self.problem.to_dict() if self.problem else None,
        }

    def agent_to_dict(self, agent: Agent) -> dict[str, Any]:
        """The API's Agent."""
        runs = self.runs_of(agent.id)
        active = next((run for run in runs if run.active), None)
        return {
            "id": agent.id,
            "state": "running" if active else "idle",
            "run": active.id if active else None,
            "activity": active.activity if active else None,
            "last_run": runs[0].to_dict() if runs else None,
            "has_session": self._session_of(agent.id) is not None,
            "created": agent.created,
        }

    def list_agents(self) -> list[dict[str, Any]]:
        return [self.agent_to_dict(self.agents[name]) for name in sorted(self.agents)]

    def runs_of(self, agent: str | None = None) -> list[Run]:
        """Runs of one agent or of all, newest first."""
        found = [run for run in self.runs.values() if agent in (None, run.agent)]
        return sorted(found, key=lambda run: (run.started, run.id), reverse=True)

    def _session_of(self, agent: str) -> str | None:
        return next((run.session_id for run in self.runs_of(agent) if run.session_id), None)

    def agent(self, agent_id: str) -> Agent:
        """Raises `BadRequest` for an id that none can have, `NotFound` for one that none has."""
        check_agent_id(agent_id)
        if agent_id not in self.agents:
            raise NotFound(
                f"There is no agent `{agent_id}`: create it, or look at the list of agents.", "unknown_agent"
            )
        return self.agents[agent_id]

    def run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise NotFound(f"There is no run `{run_id[:40]}`: look at the list of runs.", "unknown_run")
        return self.runs[run_id]

    # --- who watches --------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Give `listener` all messages (docs/api.md) meanwhile, and keep the workspace."""
        self._listeners.add(listener)
        self._wanted = True
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            self._listeners.discard(listener)
            self._used = time.monotonic()

    def _tell(self, message: Message) -> None:
        for listener in list(self._listeners):
            listener(message)

    def _changed(self) -> None:
        """Announce the new state soon, once for all that changes until then."""
        if not self._announcing and self._listeners:
            self._announcing = True
            asyncio.get_running_loop().call_later(0.1, self._announce)

    def _announce(self) -> None:
        self._announcing = False
        self._tell(self.state_message())

    def state_message(self) -> Message:
        return {"type": "state", "workspace": self.to_dict(), "agents": self.list_agents()}

    async def _watch(self) -> None:
        """While somebody watches: keep the workspace up and sample its memory."""
        while self._listeners:
            try:
                if self._wanted:
                    await self._sample_on()
            except AgentsError as e:
                if not isinstance(e, ContainerGone):
                    self._set_problem(e)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _sample_on(self) -> None:
        async with self._exec("watch", 0, interval=SAMPLE_SECONDS) as process:
            text = ""
            while self._listeners:
                line = await process.stdout.readline()
                if not line:
                    break
                if line != b"\n":
                    text += line.decode("utf-8", "replace")
                    continue
                sample, text = agentctl.Sample.parse(text), ""
                await self._take(sample)
                self._show(sample)
            await process.write(b"\n")
        if self._listeners:
            self._lost()

    def _show(self, sample: agentctl.Sample) -> None:
        self.memory = sample.memory(self.limits.memory_warning_bytes, self.limits.memory_bytes)
        self._tell({"type": "memory", "memory": self.memory})
        high = self.memory["level"] != "ok"
        if high and not self._warned:
            used, limit = self.memory["used_bytes"] / 2**20, self.memory["limit_bytes"] / 2**20
            self.log.warning("%s uses %.0f MB of %.0f MB", self.name, used, limit)
            self._tell({"type": "warning", "memory": self.memory})
        self._warned = high

    # --- the container ------------------------------------------------------------------------------------------

    async def connect(self) -> Container:
        """The running container, started or adopted when need be."""
        self._wanted = True
        self._used = time.monotonic()
        async with self._lock:
            if self.container is None:
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
            assert self.container is not None
            return self.container

    async def _start(self) -> None:
        container = await self.engine.ensure(self.user, self.limits)
        sample = await self._look_into(container)
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
        self.problem = error
        if isinstance(error, Unavailable):
            self._lost()
        self._changed()

    def _lost(self) -> None:
        """The container is not to be reached; what became of its runs is seen when one is there again."""
        self.container = None
        self.memory = None
        self._changed()

    async def leave(self) -> None:
        """The server stops: remove the container when it is idle."""
        self._listeners.clear()
        for task in [self._watcher, *self._following.values()]:
            if task:
                task.cancel()
        if self.container:
            try:
                await self.remove_if_idle(self.container)
            except AgentsError as e:
                self.log.warning("%s stays: %s", self.name, e)

    async def remove_if_idle(self, container: Container) -> bool:
        """Remove the container unless a run is active in it, started by whichever server."""
        async with self._lock:
            if self.active_runs or self._execs:
                return False
            if container.running:
                try:
                    if (await self._look_into(container)).supervisors:
                        return False
                except ContainerGone:
                    pass
            await self.engine.remove(self.user)
            self._lost()
            return True

    async def look_after(self) -> None:
        """Called every now and then: notice runs that ended unseen, and let an idle workspace go."""
        if self.container is None:
            return
        if self.active_runs and not self._listeners:  # who watches samples anyway
            await self.refresh()
        idle = not self._listeners and not self.active_runs and not self._execs
        if not idle:
            self._used = time.monotonic()
        elif time.monotonic() - self._used > self.owner.cleanup_grace and self.container:
            self.log.info("Removing the idle %s", self.name)
            await self.remove_if_idle(self.container)

    async def stop(self, volume: bool = False) -> None:
        """Cancel all runs and remove the container; with `volume`, all agents and files too."""
        if self.container:
            await asyncio.gather(*(self.cancel(run.id) for run in self.active_runs))
        async with self._lock:
            self._wanted = False
            await self.engine.remove(self.user, volume)
            self._lost()
            for run in self.active_runs:
                run.lose()
                self._end(run)
            if volume:
                self.agents.clear()
                self.runs.clear()
        self._changed()

    # --- what is in it ------------------------------------------------------------------------------------------

    async def _look_into(self, container: Container) -> agentctl.Sample:
        async with self._request(container, "sample", 0, {}) as process:
            return agentctl.Sample.parse((await self._all(process)).decode("utf-8", "replace"))

    async def refresh(self, older_than: float = 0) -> None:
        """Look into the container, unless that was done a moment ago, and take in what another server has done."""
        container = await self.connect()
        if time.monotonic() - self._sampled < older_than:
            return
        try:
            await self._take(await self._look_into(container))
        except ContainerGone:
            self._lost()
            await self.connect()

    async def _take(self, sample: agentctl.Sample, everything: bool = False) -> None:
        """Bring the cache in line with a sample."""
        self._sampled = time.monotonic()
        supervisors = {
            run: process for run, process in sample.supervisors.items() if process.uid in sample.uids.values()
        }
        for gone in self.agents.keys() - sample.uids.keys():
            self._forget(gone)
        new = sample.uids.keys() - self.agents.keys()
        stale = {run.agent for run in self.active_runs if run.id not in supervisors and run.id not in self._reserved}
        owners = {process.uid for run, process in supervisors.items() if run not in self.runs}
        unknown = {name for name, uid in sample.uids.items() if uid in owners}
        names = sample.uids.keys() if everything else new | stale | unknown
        if not names:
            return
        await asyncio.gather(*(self._load(name, sample.uids[name]) for name in names if AGENT_ID.fullmatch(name)))
        full = sample.figures.get("free_kb", 1) < 1
        for run in self.active_runs:
            if run.id in self._reserved:
                continue
            if run.id in supervisors:
                self._follow(run)
            else:
                run.lose(full)
                self._end(run)
        self._changed()

    async def _load(self, name: str, uid: int) -> None:
        """Read an agent's directory: names of variables, and runs."""
        assert self.container is not None
        async with self._request(self.container, "load", uid, {"agent": name}) as process:
            files = agentctl.untar(await self._all(process))
        agent = self.agents.setdefault(name, Agent(name, uid))
        agent.uid = uid
        agent.env = sorted(environment.read(files.get(".env", (b"", 0))[0].decode("utf-8", "replace")))
        agent.created = files.get(".agent/created", (b"", agent.created))[1]
        by_run: dict[str, dict[str, bytes]] = {}
        for path, (content, _) in files.items():
            if path.startswith(".agent/runs/") and path.count("/") == 3:
                _, _, run_id, file = path.split("/")
                by_run.setdefault(run_id, {})[file] = content
        for run_id, contents in by_run.items():
            read = Run.from_files(name, contents, self.limits.memory_bytes)
            if read is None or read.id != run_id:
                continue
            known = self.runs.get(run_id)
            if known is None:
                self.runs[run_id] = read
            elif known.active and not read.active:
                known.settle(read)
                self._end(known)

    def _forget(self, name: str) -> None:
        self.agents.pop(name, None)
        for run in self.runs_of(name):
            del self.runs[run.id]

    # --- requests to agentctl -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(
        self, container: Container, verb: str, uid: int, values: dict[str, object]
    ) -> AsyncIterator[Exec]:
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
        self._execs += counted
        try:
            container = await self.connect()
            try:
                process = await self.engine.exec(container, ["sh", agentctl.PATH, verb], uid)
            except ContainerGone:
                self._lost()
                process = await self.engine.exec(await self.connect(), ["sh", agentctl.PATH, verb], uid)
            try:
                await process.write(agentctl.request({"agent": "", "run": ""} | values))
                yield process
            finally:
                process.close()
        finally:
            self._execs -= counted
            self._used = time.monotonic()

    async def _all(self, process: Exec, most: int = 64 * 2**20) -> bytes:
        """All that it prints, and an error if it fails."""
        out = bytearray()
        while chunk := await process.stdout.read(2**16):
            out += chunk
            if len(out) > most:
                raise TooLarge(f"The answer is larger than {most // 2**20} MB.", "too_large")
        await self._check(process)
        return bytes(out)

    async def _check(self, process: Exec) -> None:
        code = await process.wait()
        if code:
            raise agentctl.error(code, process.stderr)

    async def _ask(self, verb: str, agent: Agent, data: bytes = b"", **values: object) -> str:
        async with self._exec(verb, agent.uid, agent=agent.id, size=len(data), **values) as process:
            if data:
                await process.write(data)
            return (await self._all(process)).decode("utf-8", "replace")

    # --- agents -------------------------------------------------------------------------------------------------

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
        except BaseException:
            self.agents.pop(agent_id, None)
            raise
        self._audit("agent_created", agent_id)
        self._changed()
        return agent

    def _new_uid(self, agent_id: str) -> int:
        """Made from the name, so that two servers at once agree; the next free one when it is taken."""
        if not self.owner.isolate_agents:
            return SHARED_UID
        taken = {agent.uid for agent in self.agents.values()}
        uid = int(hashlib.sha256(agent_id.encode()).hexdigest(), 16) % UIDS
        while FIRST_UID + uid in taken:
            uid = (uid + 1) % UIDS
        return FIRST_UID + uid

    async def remove_agent(self, agent_id: str) -> None:
        """Cancel its run and delete its directory."""
        await self.connect()
        agent = self.agent(agent_id)
        async with agent.lock:
            for run in self.runs_of(agent_id):
                if run.active:
                    await self.cancel(run.id)
            await self._ask("wipe", agent)
            # An agent that opened its directory to others may have files of theirs in it.
            for other in list(self.agents.values()):
                try:
                    async with self._exec("discard", 0, agent=agent_id) as process:
                        await self._check(process)
                    break
                except AgentsError:
                    async with self._exec("wipe", other.uid, agent=agent_id) as process:
                        await process.wait()
            else:
                raise Conflict(f"The directory of `{agent_id}` can't be emptied; try again.", "agent_busy")
            self._forget(agent_id)
        self._audit("agent_removed", agent_id)
        self._changed()

    def _audit(self, action: str, agent: str, run: Run | None = None) -> None:
        about = {"run": run.id, "state": run.state} if run else {}
        self.owner.audit({"action": action, "user": self.user, "agent": agent, **about})

    # --- an agent's variables -----------------------------------------------------------------------------------

    async def set_env(self, agent_id: str, changes: dict[str, str | None]) -> list[str]:
        """Set variables, or unset those whose value is None; the names that there are now."""
        await self.connect()
        agent = self.agent(agent_id)
        if any("\0" in value for value in changes.values() if value):
            raise BadRequest("A value can't hold the character NUL.", "bad_request")
        async with agent.lock:
            text = environment.edit(await self._ask("getenv", agent), changes)
            data = text.encode()
            if len(data) > MAX_ENV:
                raise TooLarge("The variables of an agent may take 1 MiB together.", "too_large")
            await self._ask("setenv", agent, data)
            agent.env = sorted(environment.read(text))
        return agent.env

    async def env_names(self, agent_id: str) -> list[str]:
        await self.connect()
        agent = self.agent(agent_id)
        agent.env = sorted(environment.read(await self._ask("getenv", agent)))
        return agent.env

    # --- an agent's files ---------------------------------------------------------------------------------------

    def path(self, path: str, root: bool = False) -> str:
        """A path within an agent, tidied; `root` says whether the agent's directory itself will do."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in path or len(path) > 4096 or not (parts or root):
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
            kind, _, size = (await process.stdout.readline()).decode().partition(" ")
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
            if not await process.stdout.readline():
                await self._check(process)
            yield process

    @asynccontextmanager
    async def receive_file(self, agent_id: str, path: str, size: int) -> AsyncIterator[Exec]:
        """The process to write `size` bytes to, which `stored` then concludes. The file appears when it is complete."""
        await self.connect()
        agent, path = self.agent(agent_id), self.path(path)
        if size > self.owner.max_upload:
            raise TooLarge(f"A file may have {self.owner.max_upload // 2**20} MB at most.", "too_large")
        async with self._exec("put", agent.uid, agent=agent_id, path=path, size=size) as process:
            if not await process.stdout.readline():
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

    async def diff(self, agent_id: str) -> str:
        """What the last run changed, up to now, as a unified diff."""
        await self.connect()
        agent = self.agent(agent_id)
        runs = self.runs_of(agent_id)
        return await self._ask("diff", agent, run=runs[0].id) if runs else ""

    # --- runs ---------------------------------------------------------------------------------------------------

    async def start_run(self, agent_id: str, request: dict[str, Any]) -> Run:
        """Start a run for a RunRequest of the API. Raises `Conflict` when the agent or the user has enough of them."""
        prompt = request["prompt"].encode("utf-8", "replace")
        if not prompt.strip():
            raise BadRequest("The prompt is empty: say what the agent shall do.", "empty_prompt")
        if len(prompt) > MAX_PROMPT:
            raise TooLarge("A prompt may have 1 MiB at most: put the rest into a file of the agent.", "too_large")
        container = await self.connect()
        agent = self.agent(agent_id)
        # From here to the reservation nothing is awaited, so that no other start can come between.
        if any(run.agent == agent_id for run in self.active_runs):
            raise Conflict(f"The agent `{agent_id}` is at work: wait for its run, or stop it.", "agent_busy")
        if len(self.active_runs) >= self.limits.runs:
            names = ", ".join(sorted(run.agent for run in self.active_runs))
            raise Conflict(
                f"{len(self.active_runs)} runs are active ({names}), which is the limit: wait for one, or stop it.",
                "too_many_runs",
            )
        session = self._session_of(agent_id) if request.get("continue", True) else None
        run = Run(
            id=new_id(),
            agent=agent_id,
            prompt=request["prompt"][:SHOWN_OF_PROMPT],
            model=request.get("model"),
            continued=session is not None,
            started=time.time(),
            container=container.id,
        )
        self.runs[run.id] = run
        self._reserved.add(run.id)
        self._ended[run.id] = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._follow(run, self._launch(run, agent, prompt, claude.options(request, session), request, ready))
        try:
            await asyncio.shield(ready)
        finally:
            self._changed()
        return run

    async def _launch(
        self,
        run: Run,
        agent: Agent,
        prompt: bytes,
        options: list[str],
        request: dict[str, Any],
        ready: asyncio.Future[None],
    ) -> None:
        """Start the run's supervisor and go on to read its log, all in one exec."""
        timeout = request.get("timeout", self.owner.run_timeout)
        try:
            async with self._exec(
                "run",
                agent.uid,
                agent=agent.id,
                run=run.id,
                size=len(prompt),
                record=run.record(),
                options=shlex.join(options),
                timeout=math.ceil(timeout),
                idle=math.ceil(self.owner.run_idle_timeout),
                linger=math.ceil(self.owner.run_linger),
            ) as process:
                size = await process.stdout.readline()
                if not size:
                    await self._check(process)
                dotenv = await process.stdout.readexactly(int(size))
                variables = environment.for_run(
                    environment.passed_on(self.owner.pass_environment, self.owner.environment),
                    self.owner.engine.ca_bundle_path,
                    dotenv.decode("utf-8", "replace"),
                )
                exports = agentctl.assignments(variables, export=True)
                await process.write(exports.encode("utf-8", "surrogateescape") + b"\n" + prompt)
                if await process.stdout.readline() != b"started\n":
                    await self._check(process)
                self._audit("run_started", agent.id, run)
                self._tell({"type": "run", "run": run.to_dict()})
                ready.set_result(None)
                self._reserved.discard(run.id)
                await self._read_log(run, process)
        except Exception as e:
            if ready.done():
                raise
            del self.runs[run.id]
            if isinstance(e, (asyncio.IncompleteReadError, ValueError)):
                e = ContainerGone()
            ready.set_exception(e)
        finally:
            self._reserved.discard(run.id)

    def _follow(self, run: Run, start: Coroutine[None, None, None] | None = None) -> None:
        """Read the log of an active run, as long as that takes, to know what it does and how it ends."""
        if run.id not in self._following:
            self._ended.setdefault(run.id, asyncio.Event())
            task = asyncio.get_running_loop().create_task(self._read_on(run, start))
            self._following[run.id] = task
            task.add_done_callback(lambda _: self._following.pop(run.id, None))

    async def _read_on(self, run: Run, start: Coroutine[None, None, None] | None) -> None:
        if start:
            await start
        while run.id in self.runs and run.active:
            try:
                async with self._exec(
                    "follow", self.agents[run.agent].uid, agent=run.agent, run=run.id, since=0, wait=1
                ) as process:
                    await self._read_log(run, process)
                if run.active:
                    await self.refresh()  # it ended unseen, or only our reading did
            except AgentsError as e:
                self._set_problem(e)
            if run.active:
                await asyncio.sleep(1)

    async def _read_log(self, run: Run, process: Exec) -> None:
        lines, result = claude.Lines(), claude.parse(b"")
        while run.active and (chunk := await process.stdout.read(2**16)):
            for line in lines.feed(chunk):
                event = claude.parse(line)
                if event["type"] == "result":
                    result = event
                elif event["type"] == "run_end":
                    await self._conclude(run, event, result)
                elif run.see(event):
                    self._changed()
        await process.write(b"\n")

    async def _conclude(self, run: Run, end: claude.Event, result: claude.Event) -> None:
        if result["type"] != "result":
            # Only the directory has what Claude said on standard error.
            agent = self.agents[run.agent]
            await self._load(agent.id, agent.uid)
        if run.active:
            run.conclude(end, result, b"", self.limits.memory_bytes)
            self._end(run)

    def _end(self, run: Run) -> None:
        """Tell everyone that a run, which has its final state, has ended."""
        self._audit("run_ended", run.agent, run)
        self._tell({"type": "run", "run": run.to_dict()})
        if run.id in self._ended:
            self._ended.pop(run.id).set()
        self._used = time.monotonic()
        self._changed()

    async def cancel(self, run_id: str) -> Run:
        """Stop a run and all that it started; answers when it has ended."""
        run = self.run(run_id)
        while run.id in self._reserved:
            await asyncio.sleep(0.02)
        if run.active:
            ended = self._ended.setdefault(run_id, asyncio.Event())
            await self._ask("stop", self.agent(run.agent), run=run_id)
            try:
                await asyncio.wait_for(ended.wait(), 2)
            except asyncio.TimeoutError:
                await self.refresh()
        return self.run(run_id)

    async def events(self, run_id: str, since: int, follow: bool) -> AsyncGenerator[list[bytes], None]:
        """A run's events from number `since` on, in lists as they come, each as its line of JSON."""
        await self.connect()
        run = self.run(run_id)
        if self._followers >= MAX_FOLLOWERS:
            raise Conflict(
                f"{MAX_FOLLOWERS} readers of logs are open, which is the limit: close one.", "too_many_readers"
            )
        self._followers += 1
        try:
            while True:
                live = follow and run.active
                async with self._exec(
                    "follow", self.agent(run.agent).uid, agent=run.agent, run=run_id, since=since, wait=int(live)
                ) as process:
                    lines, ended = claude.Lines(), False
                    while not ended and (chunk := await process.stdout.read(2**16)):
                        batch = [claude.parse(line) for line in lines.feed(chunk)]
                        ended = any(event["type"] == "run_end" for event in batch)
                        since += len(batch)
                        yield [json.dumps(event).encode() for event in batch]
                    if live:
                        await process.write(b"\n")
                if ended or not live:
                    return
                await asyncio.sleep(1)  # its container went away; whether the run did is being found out
        finally:
            self._followers -= 1

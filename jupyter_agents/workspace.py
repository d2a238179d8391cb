"""A user's workspace: its state, who watches it, and how long it is kept.

State lives in the agents' directories; what is kept here is a cache of it, and is read again whenever the container is
another one or shows something that the cache doesn't know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from . import agentctl
from .agents import Agent
from .engine import Container
from .errors import AgentsError, Conflict, ContainerGone, Protected
from .link import Message
from .runs import Runs
from .settings import Settings

SAMPLE_SECONDS = 2
SETTLED_SECONDS = 5
STOP_SECONDS = 8

Listener = Callable[[Message], None]


class Workspace(Runs):
    """One user's workspace."""

    def __init__(self, user: str, settings: Settings):
        super().__init__(user, settings)
        self.memory: dict[str, Any] | None = None
        self._listeners: set[Listener] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._sampled = 0.0
        self._warned = False
        self._announcing = False

    @property
    def watched(self) -> bool:
        return bool(self._listeners)

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
            "image": self.container.image if self.container else None,
            "images": self.engine.images,
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

    async def measure(self) -> None:
        """Sample the memory once, for somebody who doesn't watch."""
        if self.container:
            sample = await self._look_into(self.container)
            self.memory = sample.memory(self.limits.memory_warning_bytes, self.limits.memory_bytes)

    def _show(self, sample: agentctl.Sample) -> None:
        self.memory = sample.memory(self.limits.memory_warning_bytes, self.limits.memory_bytes)
        self._tell({"type": "memory", "memory": self.memory})
        high = self.memory["level"] != "ok"
        if high and not self._warned:
            used, limit = self.memory["used_bytes"] / 2**20, self.memory["limit_bytes"] / 2**20
            self.log.warning("%s uses %.0f MB of %.0f MB", self.name, used, limit)
            self._tell({"type": "warning", "memory": self.memory})
        self._warned = high

    # --- how long it is kept ------------------------------------------------------------------------------------

    def _lost(self) -> None:
        super()._lost()
        self.memory = None

    async def leave(self) -> None:
        """The server stops: remove the container when it is idle."""
        self._listeners.clear()
        async with self._lock:  # a start that goes on would leave its container behind
            pass
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
        elif time.monotonic() - self._used > self.settings.cleanup_grace and self.container:
            self.log.info("Removing the idle %s", self.name)
            await self.remove_if_idle(self.container)

    async def stop(self, volume: bool = False) -> None:
        """Cancel all runs and remove the container; with `volume`, all agents and files too."""
        if self.container:
            # So that Claude can save its sessions; what an agent makes of it is no reason to stay.
            cancelled = (self.cancel(run.id) for run in self.active_runs)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*cancelled, return_exceptions=True), STOP_SECONDS)
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

    async def choose_image(self, image: str) -> None:
        """Make the container anew from another image, and so from now on. Files stay."""
        images = self.engine.images
        if image not in images:
            raise Protected(f"That image is not allowed: choose one of {', '.join(images)}.", "image_not_allowed")
        async with self._lock:
            for container in await self.engine.containers(self.user):
                if container.running and (self.active_runs or (await self._look_into(container)).supervisors):
                    raise Conflict(
                        "Agents are at work: stop their runs or wait for them, then choose the image.", "runs_active"
                    )
            await self.engine.ensure(self.user, self.settings.limits_for(self.user), image)
            self._lost()
        await self.connect()
        self.log.info("%s has the image %s now, as its user chose", self.name, image)

    # --- what is in it ------------------------------------------------------------------------------------------

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
        owners = {uid: name for name, uid in sample.uids.items()}
        # An agent may call a process of its own a supervisor, but only of its own runs.
        alive = {(owners.get(process.uid), process.supervises) for process in sample.processes}
        # What was just made or started may be younger than the sample.
        for name, agent in list(self.agents.items()):
            settled = time.monotonic() - agent.made > SETTLED_SECONDS and not agent.lock.locked()
            if name not in sample.uids and settled:
                self._forget(name)
        new = sample.uids.keys() - self.agents.keys()
        due = [run for run in self.active_runs if time.time() - run.started > SETTLED_SECONDS]
        stale = {run.agent for run in due if (run.agent, run.id) not in alive}
        unknown = {name for name, run in alive if name and run and run not in self.runs}
        names = sample.uids.keys() if everything else new | stale | unknown
        if not names:
            return
        await asyncio.gather(*(self._load(name, sample.uids[name]) for name in names if name in sample.uids))
        for run in self.active_runs:
            if (run.agent, run.id) in alive:
                self._follow(run)
            elif self.container and run.container != self.container.id:
                run.lose()
                self._end(run)
            elif run in due:
                run.lose("run_killed" if sample.figures.get("free_kb", 1) else "disk_full")
                self._end(run)
        self._changed()

"""A user's runs: start, follow, cancel, and how they end."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from . import agentctl, claude, environment
from .agents import MAX_ENV, Agent, Agents, too_many_variables
from .engine import Exec
from .errors import AgentsError, BadRequest, Conflict, ContainerGone, NotFound, Stuck, TooLarge, Unavailable
from .run import SHOWN_OF_PROMPT, Run, new_id
from .settings import Settings

MAX_PROMPT = 2**20
MAX_FOLLOWERS = 32
KEPT_RUNS = 200  # of an agent; it can make any number
MAX_LOAD = 32 * 2**20
READ_SECONDS = 5


class Runs(Agents):
    """Runs by id, those of all agents. A run's log is the only source of what is told of it."""

    def __init__(self, user: str, settings: Settings):
        super().__init__(user, settings)
        self.runs: dict[str, Run] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        self._followers = 0
        self._reserved: set[str] = set()  # ids of runs whose supervisor may not be there yet
        self._ended: dict[str, asyncio.Event] = {}

    @property
    def active_runs(self) -> list[Run]:
        return [run for run in self.runs.values() if run.active]

    def runs_of(self, agent: str | None = None) -> list[Run]:
        """Runs of one agent or of all, newest first."""
        found = [run for run in self.runs.values() if agent in (None, run.agent)]
        return sorted(found, key=lambda run: (run.started, run.id), reverse=True)

    def _session_of(self, agent: str) -> str | None:
        return next((run.session_id for run in self.runs_of(agent) if run.session_id), None)

    def run(self, run_id: str) -> Run:
        if run_id not in self.runs:
            raise NotFound(f"There is no run `{run_id[:40]}`: look at the list of runs.", "unknown_run")
        return self.runs[run_id]

    async def _load(self, name: str, uid: int) -> None:
        """Read an agent's directory: names of variables, and runs."""
        if self.container is None:
            raise ContainerGone
        files: dict[str, tuple[bytes, float]] = {}
        try:
            async with self._request(self.container, "load", uid, {"agent": name}) as process:
                files = await asyncio.to_thread(agentctl.untar, await self._all(process, MAX_LOAD))
        except NotFound:
            return  # removed since we heard of it
        except (Stuck, TooLarge) as e:  # one agent must not keep the others away
            self.log.warning("The agent %s in %s can't be read: %s", name, self.name, e)
        agent = self.agents.setdefault(name, Agent(name, uid))
        agent.uid = uid
        dotenv = files.get(".env", (b"", 0))[0].decode("utf-8", "replace")
        agent.env = sorted(await asyncio.to_thread(environment.read, dotenv))
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
        for run in self.runs_of(name)[KEPT_RUNS:]:
            if not run.active:
                del self.runs[run.id]

    def _forget(self, name: str) -> None:
        self.agents.pop(name, None)
        for run in self.runs_of(name):
            del self.runs[run.id]

    async def remove_agent(self, agent_id: str) -> None:
        """Cancel its run and delete its directory."""
        await self.connect()
        self.agent(agent_id)
        await asyncio.gather(*(self.cancel(run.id) for run in self.active_runs if run.agent == agent_id))
        await super().remove_agent(agent_id)
        self._forget(agent_id)

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
        if agent.lock.locked() or any(run.agent == agent_id for run in self.active_runs):
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
        timeout = request.get("timeout", self.settings.run_timeout)
        try:
            certificates = self.engine.certificates
            async with self._exec(
                "run",
                agent.uid,
                agent=agent.id,
                run=run.id,
                size=len(prompt),
                record=run.record(),
                options=shlex.join(options),
                timeout=math.ceil(timeout),
                idle=math.ceil(self.settings.run_idle_timeout),
                linger=math.ceil(self.settings.run_linger),
                certificates=len(certificates),
            ) as process:
                size = await self._in_time(process.stdout.readline())
                if not size:
                    await self._check(process)
                if int(size) > MAX_ENV:
                    raise too_many_variables()
                dotenv = await self._in_time(process.stdout.readexactly(int(size)))
                variables = await asyncio.to_thread(
                    environment.for_run,
                    environment.passed_on(self.settings.pass_environment, self.settings.environment),
                    agentctl.certificates(agent.id) if certificates else "",
                    dotenv.decode("utf-8", "replace"),
                )
                exports = agentctl.assignments(variables, export=True)
                await process.write(exports.encode("utf-8", "surrogateescape") + b"\n" + prompt + certificates)
                if await self._in_time(process.stdout.readline()) != b"started\n":
                    await self._check(process)
                self._audit("run_started", agent=agent.id, run=run.id, state=run.state)
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
        while run.id in self.runs and run.active:
            try:
                reading, start = start or self._read_again(run), None
                await reading
                if run.active:
                    await self.refresh()  # it ended unseen, or only our reading did
            except AgentsError as e:
                self._set_problem(e)
            if run.active:
                await asyncio.sleep(1)

    async def _read_again(self, run: Run) -> None:
        uid = self.agent(run.agent).uid
        async with self._exec("follow", uid, agent=run.agent, run=run.id, since=0, wait=1) as process:
            await self._read_log(run, process)

    async def _read_log(self, run: Run, process: Exec) -> None:
        lines, result = claude.Lines(), claude.parse(b"")
        run.logged = 0
        async for chunk in self._chunks(process, run):
            for line in lines.feed(chunk):
                run.logged += 1
                event = claude.parse(line)
                if event["type"] == "result":
                    result = event
                elif event["type"] == "run_end":
                    await self._conclude(run, event, result)
                elif run.see(event):
                    self._changed()
            if not run.active:
                break
        await process.write(b"\n")

    async def _chunks(self, process: Exec, run: Run | None) -> AsyncGenerator[bytes, None]:
        """What a process prints; of one that waits for the end of a run, no longer than the run is active."""
        while True:
            try:
                chunk = await asyncio.wait_for(process.stdout.read(2**16), READ_SECONDS)
            except asyncio.TimeoutError:
                if run is None or run.active:
                    continue
                return  # the run was lost, and its log will never end
            if not chunk:
                return
            yield chunk

    async def _conclude(self, run: Run, end: claude.Event, result: claude.Event) -> None:
        if result["type"] != "result":
            # Only the directory has what Claude said on standard error.
            agent = self.agents[run.agent]
            try:
                await self._load(agent.id, agent.uid)
            except AgentsError as e:
                self.log.warning("What the run %s said is not to be had: %s", run.id, e)
        if run.active:
            run.conclude(end, result, b"", self.limits.memory_bytes)
            self._end(run)

    def _end(self, run: Run) -> None:
        """Tell everyone that a run, which has its final state, has ended."""
        self._audit("run_ended", agent=run.agent, run=run.id, state=run.state)
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
        """A run's events from number `since` on, in lists as they come, each as its line of JSON.

        Whoever follows waits while the engine is away: that it is shows in the state of the workspace.
        """
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
                ended = False
                try:
                    async with aclosing(self._events(run, since, live)) as batches:
                        async for lines, ended in batches:  # noqa: B007 - `ended` is used below
                            since += len(lines)
                            yield lines
                except Unavailable:
                    if not follow:
                        raise
                else:
                    if ended or not live:
                        return
                await asyncio.sleep(1)  # its container went away; whether the run did is being found out
        finally:
            self._followers -= 1

    async def _events(self, run: Run, since: int, live: bool) -> AsyncGenerator[tuple[list[bytes], bool], None]:
        """Lines of the log from number `since` on, and whether the run's end is among them."""
        # Asked for more lines than there are, `tail -f` would give all that come from now on.
        start = min(since, run.logged) if live else since
        skip = since - start
        async with self._exec(
            "follow", self.agent(run.agent).uid, agent=run.agent, run=run.id, since=start, wait=int(live)
        ) as process:
            lines = claude.Lines()
            async for chunk in self._chunks(process, run if live else None):
                batch = [(claude.parse(line), line) for line in lines.feed(chunk)]
                ended = any(event["type"] == "run_end" for event, _ in batch)
                skip, batch = max(0, skip - len(batch)), batch[skip:]
                yield [json.dumps(event).encode() if event["type"] == "raw" else line for event, line in batch], ended
                if ended:
                    break
            if live:
                await process.write(b"\n")

    async def diff(self, agent_id: str) -> str:
        """What the last run changed, up to now, as a unified diff."""
        await self.connect()
        agent = self.agent(agent_id)
        runs = self.runs_of(agent_id)
        return await self._ask("diff", agent, run=runs[0].id) if runs else ""

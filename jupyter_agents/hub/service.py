"""The Hub service: it alone holds the engine, and serves the same calls as a single user's extension, to all users."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jupyter_core.application import JupyterApp
from jupyter_server.auth import AllowAllAuthorizer
from jupyterhub.services.auth import HubOAuth
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.log import LogFormatter
from traitlets import Bool, Dict, Enum, Float, Unicode, default

from .. import handlers
from ..docker_engine import DockerEngine, T
from ..engine import Limits
from ..errors import AgentsError, NotFound, Unavailable
from ..workspace import Workspace
from ..workspaces import Workspaces
from . import admin
from .configure import ADMIN_SCOPE, SERVICE, SERVICE_SCOPES, access_scope
from .hubapi import HubAPI, HubDown
from .identity import HubIdentity, TokenCache
from .metrics import Metrics

LIMITS = {"memory": "memory_bytes", "cpu": "cpu", "agents": "agents", "runs": "runs", "pids": "pids"}
ADMIN_SECONDS = 5  # for which the Hub's answer on an administrator's credentials is believed
FEW_USERS = 2  # who may vanish at once, and be all that there are, without being thought lost by the Hub
PROBLEM_SECONDS = 5  # for which what is known of Hub and engine is told without asking them again
PAGE_SECONDS = 5  # for which the administrators' page waits for what workspaces say
MAX_JSON = 16 * 2**20  # of a body that isn't a file


class HubEngine(DockerEngine):
    """The engine as users see it: what only an administrator can mend is told to administrators."""

    def _call(self, function: Callable[[Any], T]) -> T:
        try:
            return super()._call(function)
        except Unavailable as e:
            if not e.command:
                raise
            raise Unavailable(
                "The workspaces of this Hub are not available just now, their files are kept; tell your administrator "
                "if it stays so.",
                e.reason,
            ) from e


def in_full(error: AgentsError) -> str:
    """For administrators: what is wrong with the engine, and what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, AgentsError) else error
    return f"{cause}{f' ({cause.command})' if cause.command else ''}"


class HubWorkspaces(Workspaces):
    """Workspaces with limits by user and by group of the Hub."""

    @default("engine_class")
    def _default_engine_class(self) -> type[HubEngine]:
        return HubEngine

    group_limits = Dict(
        help="Limits of the members of groups, such as {'students': {'memory': 2**29, 'runs': 1}}: any of memory "
        "(bytes), cpu, agents, runs, pids. A member of several gets the most generous of each."
    ).tag(config=True)
    user_limits = Dict(help="Limits of single users, in the same form. They win over those of groups.").tag(config=True)
    api_key_file = Unicode(help="File with the Anthropic API key of all runs; an agent's own `.env` wins over it.").tag(
        config=True
    )

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.metrics = Metrics(self)
        self._groups: dict[str, frozenset[str]] = {}
        for who, limits in [*self.group_limits.items(), *self.user_limits.items()]:
            if unknown := limits.keys() - LIMITS.keys():
                raise ValueError(f"Limits of {who!r} name {sorted(unknown)}: there are only {sorted(LIMITS)}.")
        if self.api_key_file:
            key = Path(self.api_key_file).read_text().strip()
            self.environment = {**self.environment, "ANTHROPIC_API_KEY": key}

    def engine_failed(self, error: AgentsError) -> None:
        self.metrics.engine_errors.labels(error.reason).inc()

    def limits_for(self, user: str) -> Limits:
        limits = super().limits_for(user)
        chosen: dict[str, Any] = {}
        for group in self._groups.get(user, ()):
            for name, value in self.group_limits.get(group, {}).items():
                chosen[name] = max(value, chosen.get(name, value))
        chosen |= self.user_limits.get(user, {})
        limits = replace(limits, **{LIMITS[name]: value for name, value in chosen.items()})
        share = self.memory_warning / self.memory_limit
        return replace(limits, memory_warning_bytes=int(limits.memory_bytes * share))

    def seen(self, user: str, groups: Iterable[str]) -> None:
        """Take note of a user's groups. Other limits hold from the next start of the workspace."""
        now = frozenset(groups)
        if self._groups.get(user) != now:
            self._groups[user] = now
            if user in self._workspaces and self.get(user).container is None:
                self.get(user).limits = self.limits_for(user)

    def knows(self, user: str) -> bool:
        """Whether the Hub has the user, by its list or by a call of theirs."""
        return user in self._groups

    async def adopt(self) -> None:
        """Look after all containers that a former service has left, so that idle ones of absent users go too."""
        await self.engine.check()
        running = [container for container in await self.engine.containers() if container.running]
        left = [container for container in running if self.get(container.user).container is None]
        for container in left:
            self.log.info("Adopting %s", container.name)
        await self.each(Workspace.adopt, [self.get(container.user) for container in left], at_once=8)

    async def forget(self, user: str, volume: bool) -> None:
        """The user is gone from the Hub: remove the container, and the volume too if told so."""
        workspace = self.get(user)
        # Who still holds it, as an open socket does, must not start it again; a new user of that name has another.
        workspace.closed = NotFound("This user is not in the Hub any more.", "user_gone")
        self._workspaces.pop(user, None)
        self._groups.pop(user, None)
        await workspace.stop(volume=volume)


class AgentsHub(JupyterApp):
    """`jupyter agents hub`: the service of `jupyter_agents` on a JupyterHub."""

    name = "jupyter-agents-hub"
    description = "The JupyterHub service of jupyter_agents; jupyter_agents.hub.configure lets the Hub start it."
    classes = [HubWorkspaces, DockerEngine, TokenCache]  # noqa: RUF012 - as traitlets has it
    flags = {  # noqa: RUF012
        "managed": ({"AgentsHub": {"managed": True}}, "End when the Hub that started it has ended."),
    }

    _log_formatter_cls = LogFormatter  # type: ignore[assignment]

    @default("log_format")
    def _default_log_format(self) -> str:
        return "%(color)s[%(levelname)1.1s %(asctime)s %(name)s]%(end_color)s %(message)s"

    @default("log_level")
    def _default_log_level(self) -> int:
        return logging.INFO

    admin_scope = Unicode(ADMIN_SCOPE, help="Scope that lets one see, stop and delete all workspaces.").tag(config=True)
    report_activity = Bool(
        True, help="Count a running agent as activity of its user's servers, so that idle ones are not culled."
    ).tag(config=True)
    deleted_users = Enum(
        ["keep", "delete"], "keep", help="What becomes of the volume of a user who is deleted from the Hub."
    ).tag(config=True)
    hub_interval = Float(60, help="Seconds between looks at the Hub's users and groups, and reports of activity.").tag(
        config=True
    )
    managed = Bool(False, help="End when the process that started it has ended.").tag(config=True)

    service_name = Unicode(help="Name of the service in the Hub.").tag(config=True)
    url = Unicode(help="Where to listen. Default: what the Hub said, or http://127.0.0.1:10901.").tag(config=True)
    prefix = Unicode(help="Path prefix of the service. Default: what the Hub said.").tag(config=True)
    _users = Dict(help="The Hub's users as they were last seen, and those gone whose workspace has still to go.")

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._troubles: dict[object, str] = {}  # what was last logged, not to log it once a minute
        self._asking = asyncio.Lock()
        self._asked = -inf
        self._problem: str | None = None

    @default("service_name")
    def _default_service_name(self) -> str:
        return os.environ.get("JUPYTERHUB_SERVICE_NAME", SERVICE)

    @default("url")
    def _default_url(self) -> str:
        return os.environ.get("JUPYTERHUB_SERVICE_URL", "http://127.0.0.1:10901")

    @default("prefix")
    def _default_prefix(self) -> str:
        base = os.environ.get("JUPYTERHUB_BASE_URL", "/")
        return os.environ.get("JUPYTERHUB_SERVICE_PREFIX", f"{base}services/{self.service_name}/")

    def start(self) -> None:
        super().start()
        tornado = logging.getLogger("tornado")  # refused and failed calls go where all else is logged
        tornado.parent, tornado.level = self.log, logging.WARNING
        asyncio.run(self.serve())

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        tasks = [loop.create_task(self._end_with_parent(ended))] if self.managed else []
        await self.begin()
        tasks.append(loop.create_task(self._look_around_regularly()))
        await ended.wait()
        # Containers stay, with or without a run: the next service adopts them.
        self.server.stop()
        self.workspaces.engine.close()
        for task in tasks:
            task.cancel()

    async def begin(self) -> None:
        """Listen, and look after what is there."""
        if "deployment" not in self.config.DockerEngine:
            self.config.DockerEngine.deployment = self.service_name
        self.workspaces = HubWorkspaces(parent=self, audit=self._audit)
        self.hub_auth = HubOAuth.instance(
            parent=self,
            base_url=self.prefix,
            oauth_client_id=os.environ.get("JUPYTERHUB_CLIENT_ID", f"service-{self.service_name}"),
            cache_max_age=ADMIN_SECONDS,
        )
        self.hub = HubAPI(self.hub_auth.api_url, self.hub_auth.api_token)
        self.server = HTTPServer(self.application(), max_body_size=MAX_JSON, xheaders=True)
        address = urlsplit(self.url)
        self.server.listen(address.port or 80, address.hostname)
        self.log.info("Serving %s at %s", self.prefix, self.url)
        self.workspaces.start()

    def application(self) -> web.Application:
        """What the handlers of jupyter_server need, and no more: no kernels, terminals or files beside the engine."""
        self.tokens = TokenCache(parent=self, hub_auth=self.hub_auth)
        identity = HubIdentity(
            self.tokens,
            access_scope(self.service_name),
            lambda user: self.workspaces.seen(user["name"], user["groups"]),
            parent=self,
        )
        return web.Application(
            [*handlers.routes(self.prefix), *admin.routes(self.prefix)],
            base_url=self.prefix,
            identity_provider=identity,
            authorizer=AllowAllAuthorizer(parent=self, identity_provider=identity),
            allow_remote_access=True,  # with any Host header: names are the proxy's business
            cookie_secret=secrets.token_bytes(32),
            jupyter_agents=lambda user: self.workspaces.get(user.username),
            agents_hub=self,
        )

    async def _check_grants(self) -> None:
        missing = set(SERVICE_SCOPES) - await self.hub.own_scopes()
        if missing:
            self.log.error(
                "The service lacks the scopes %s: give them to it by a role in c.JupyterHub.load_roles, "
                "as jupyter_agents.hub.configure(c) does. Without them it knows of no groups and deleted users.",
                ", ".join(sorted(missing)),
            )

    async def _look_around_regularly(self) -> None:
        await self._look_around(self._check_grants)
        await self.workspaces.reaped.wait()  # else what is just being reaped would be adopted, which starts it again
        while True:
            await self._look_around(self._compare_users, self.workspaces.adopt, self._measure_unwatched)
            await asyncio.sleep(self.hub_interval)

    async def _look_around(self, *looks: Callable[[], Awaitable[None]]) -> None:
        """What the Hub and the engine don't tell by themselves. One that doesn't answer is asked again next time."""
        for look in looks:
            trouble = ""
            try:
                await look()
            except HubDown as e:
                trouble = f"The Hub does not answer: {e}"
            except AgentsError as e:
                trouble = in_full(e)
            except Exception:
                self.log.exception("Looking at users and workspaces failed")
            if trouble and trouble != self._troubles.get(look):
                self.log.error(trouble)
            self._troubles[look] = trouble

    async def _compare_users(self) -> None:
        """Learn who is in which groups and who is gone, and tell who is active."""
        served = {workspace.user for workspace in self.workspaces if workspace.container}
        users = await self.hub.users()
        for name, user in users.items():
            self.workspaces.seen(name, user["groups"])
        if "list:users" in await self.hub.own_scopes():  # else those that we aren't shown seem to be gone
            await self._forget((self._users.keys() | served) - users.keys())
        self._users |= users
        if self.report_activity:
            active = [w for w in self.workspaces if w.active_runs and w.user in users]
            await self.workspaces.each(lambda w: self.hub.report_activity(users[w.user]), active, at_once=8)

    async def _forget(self, missing: set[str]) -> None:
        """Remove the workspaces of those of them who are indeed not in the Hub."""
        # A volume goes only when its user was seen to go, and not with most others: a Hub may have lost its database.
        gone = self._users.keys() & missing
        if len(gone) > max(FEW_USERS, len(self._users) / 2):
            self.log.error(
                "%d of %d users vanished from the Hub at once. In case it has lost its database, their files are kept: "
                "delete those that nobody needs on the administrators' page.",
                len(gone),
                len(self._users),
            )
            for name in gone:
                del self._users[name]

        async def forget(workspace: Workspace) -> None:
            name = workspace.user
            if await self.hub.has_user(name):
                return
            volume = self.deleted_users == "delete" and name in self._users
            self.log.info("%s is not in the Hub: removing the workspace%s", name, ", with its files" * volume)
            self.tokens.forget(name)  # else one that is still believed would start another workspace
            await self.workspaces.forget(name, volume)
            self._users.pop(name, None)

        await self.workspaces.each(forget, map(self.workspaces.get, missing), at_once=8)

    async def _measure_unwatched(self, patience: float | None = None) -> None:
        unwatched = [workspace for workspace in self.workspaces if workspace.container and not workspace.watched]
        await self.workspaces.each(Workspace.measure, unwatched, patience)

    async def _end_with_parent(self, ended: asyncio.Event) -> None:
        parent = os.getppid()
        while os.getppid() == parent:
            await asyncio.sleep(1)
        self.log.warning("The Hub is gone, ending: it starts another service when it comes back")
        ended.set()

    def _audit(self, event: dict[str, Any]) -> None:
        self.log.info("%s", event)
        if event["action"] == "run_ended":
            self.workspaces.metrics.runs.labels(event["state"]).inc()

    # --- for administrators -------------------------------------------------------------------------------------

    async def problem(self) -> str | None:
        """What keeps the service from working, in a sentence. It is up to 5 s old, since anybody may ask, and often."""
        async with self._asking:
            if time.monotonic() > self._asked + PROBLEM_SECONDS:
                self._problem = await self._find_problem()
                self._asked = time.monotonic()
            return self._problem

    async def _find_problem(self) -> str | None:
        try:
            await self.hub.own_scopes()
            await self.workspaces.engine.check()
        except HubDown as e:
            return f"The Hub does not answer: {e}."
        except AgentsError as e:
            return in_full(e)
        return None

    async def list_workspaces(self) -> list[dict[str, Any]]:
        """The API's Workspace of all users who have one, by name, and whether the user is `in_hub`."""
        await self._measure_unwatched(PAGE_SECONDS)
        try:
            users = await self.workspaces.engine.users()
        except AgentsError:  # which `problem` tells
            users = [workspace.user for workspace in self.workspaces]
        return [self.workspaces.get(user).to_dict() | {"in_hub": self.workspaces.knows(user)} for user in sorted(users)]

    async def remove(self, user: str, volume: bool, by: str) -> None:
        """Stop a user's workspace, and delete all files in it if told so."""
        self.log.info("%s %s the workspace of %s", by, "deletes" if volume else "stops", user)
        await self.workspaces.get(user).stop(volume)

"""What the service does every now and then for all users: one of them, or a Hub at its worst, harms no other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import pytest
from helpers import eventually
from jupyterhub.services.auth import HubAuth
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from traitlets.config import Config

from jupyter_agents.engine import Container, Engine, Exec, Limits
from jupyter_agents.errors import AgentsError, ContainerGone, NotFound, Unavailable
from jupyter_agents.hub.configure import SERVICE_SCOPES
from jupyter_agents.hub.hubapi import HubAPI
from jupyter_agents.hub.identity import TokenCache
from jupyter_agents.hub.service import AgentsHub, HubWorkspaces


class InMemory(Engine):
    """Containers and volumes by user. What is done to those of `hang` never ends; of `fail` it raises."""

    images = ["image"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.running: dict[str, Container] = {}
        self.volumes: set[str] = set()
        self.checks = 0
        self.trouble: AgentsError | None = None
        self._mended = asyncio.Event()

    def mend(self) -> None:
        self._mended.set()

    async def _happen(self, user: str) -> None:
        if self._mended.is_set():
            return
        if user.startswith("hang"):
            await self._mended.wait()
        if user.startswith("fail"):
            raise Unavailable("It failed.", "failed")
        if user.startswith("crash"):
            raise RuntimeError("a mistake of ours")

    def begin(self, *users: str) -> None:
        """Containers that a former service has left."""
        for user in users:
            self.running[user] = Container(user, user, user, "image", running=True, started=time.time(), new=True)
            self.volumes.add(user)

    async def check(self) -> None:
        self.checks += 1
        await asyncio.sleep(0.01)
        if self.trouble:
            raise self.trouble

    async def ensure(self, user: str, limits: Limits, image: str | None = None) -> Container:
        await self._happen(user)
        self.begin(user)
        return self.running[user]

    async def containers(self, user: str | None = None) -> list[Container]:
        return [container for name, container in self.running.items() if user in (None, name)]

    async def users(self) -> list[str]:
        return sorted(self.volumes)

    async def remove(self, user: str, volume: bool = False) -> None:
        await self._happen(user)
        self.running.pop(user, None)
        if volume:
            self.volumes.discard(user)

    async def exec(self, container: Container, argv: list[str], uid: int) -> Exec:
        await self._happen(container.user)
        raise ContainerGone

    async def put(self, container: Container, tar: bytes) -> None:
        pass


class HubDouble:
    """The Hub's API over HTTP, as far as the service asks it. `between` is called between two pages of users."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.down = False  # for questions about one user
        self.broken = False
        self.looks = 0

    def between(self) -> None:
        pass

    def page(self, offset: int, limit: int) -> dict[str, Any]:
        self.looks += not offset
        if self.broken:
            return {}
        if offset:
            self.between()
        rows = [{"name": name, "groups": [], "servers": {}} for name in self.names[offset : offset + limit]]
        more = {"offset": offset + limit} if offset + limit < len(self.names) else None
        return {"items": rows, "_pagination": {"next": more}}

    def application(self) -> web.Application:
        double = self

        class Handler(web.RequestHandler):
            def get(self, path: str) -> None:
                kind, _, name = unquote(path).partition("/")
                if kind == "user":
                    self.finish({"scopes": SERVICE_SCOPES})
                elif not name:
                    self.finish(double.page(int(self.get_argument("offset")), 3))
                elif double.down:
                    raise web.HTTPError(502)
                elif name in double.names:
                    self.finish({"name": name})
                else:
                    raise web.HTTPError(404)

        return web.Application([("/(.*)", Handler)], log_function=lambda handler: None)


class Believing(HubAuth):
    """Each token is that of the user with that name, until it is `revoked`."""

    revoked = ""

    async def user_for_token(self, token: str, **options: Any) -> dict[str, Any] | None:
        return None if token == self.revoked else {"name": token}


@asynccontextmanager
async def serving(*names: str) -> AsyncIterator[tuple[AgentsHub, InMemory, HubDouble]]:
    """A service, impatient and told to take volumes too, its engine, and its Hub with these users."""
    hub = HubDouble(*names)
    server = HTTPServer(hub.application())
    socket, port = bind_unused_port()
    server.add_socket(socket)
    config = Config(HubWorkspaces={"engine_class": InMemory}, AgentsHub={"deleted_users": "delete"})
    service = AgentsHub(config=config, hub_interval=0.05, log=logging.getLogger("looks"))
    service.workspaces = HubWorkspaces(parent=service)
    service.workspaces.patience = 0.3
    service.tokens = TokenCache(parent=service, hub_auth=Believing())
    service.hub = HubAPI(f"http://127.0.0.1:{port}", "token")
    engine = service.workspaces.engine
    assert isinstance(engine, InMemory)
    service.workspaces.start()
    assert service.workspaces._housekeeper
    tasks = [service.workspaces._housekeeper, asyncio.ensure_future(service._look_around_regularly())]
    try:
        yield service, engine, hub
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.stop()


async def looks(hub: HubDouble, count: int = 2) -> None:
    """Wait until the service has begun so many further looks."""
    before = hub.looks
    await eventually(lambda: hub.looks >= before + count)


async def test_one_workspace_holds_up_and_fails_no_other(caplog: pytest.LogCaptureFixture) -> None:
    names = ["crash", "fail", "hang", "well"]
    async with serving(*names) as (service, engine, hub):
        engine.begin(*names)
        adopted = service.workspaces.get("well")
        await eventually(lambda: adopted.container)
        service.workspaces.cleanup_grace = 0
        for name in ("hang", "fail", "crash"):  # as if they were up and idle, too
            service.workspaces.get(name).container = engine.running[name]
        await eventually(lambda: "well" not in engine.running, 15)
        await looks(hub)
    assert "the workspace of 'fail': It failed." in caplog.text
    assert "did not answer within 0.3 s" in caplog.text
    assert "a mistake of ours" in caplog.text


async def test_those_who_are_gone_go_each_for_itself() -> None:
    stay = [f"stay-{n}" for n in range(9)]
    async with serving("fail-a", "hang-b", "crash-c", "well", *stay) as (_, engine, hub):
        engine.begin("fail-a", "hang-b", "crash-c", "well")
        await looks(hub)
        hub.names = stay
        await eventually(lambda: "well" not in engine.running | dict.fromkeys(engine.volumes))
        assert engine.volumes == {"fail-a", "hang-b", "crash-c"}
        # What could not be done is tried again, with the volume.
        engine.mend()
        await eventually(lambda: not engine.volumes)


async def test_an_unforeseen_error_ends_no_look(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("ann") as (_, engine, hub):
        await looks(hub)
        hub.broken = True
        await eventually(lambda: "Looking at users and workspaces failed" in caplog.text)
        hub.broken = False
        hub.names = []
        engine.begin("ann")
        await eventually(lambda: not engine.running)


async def test_who_moves_to_a_page_that_was_read_already_keeps_everything() -> None:
    names = ["a", "b", "c", "d", "e", "f", "g"]
    async with serving(*names) as (_, engine, hub):
        engine.begin("d", "a")
        await looks(hub)
        hub.between = lambda: "a" in hub.names and hub.names.remove("a")  # type: ignore[method-assign]
        await eventually(lambda: "a" not in engine.volumes)
        await looks(hub)
        assert engine.running.keys() == engine.volumes == {"d"}


async def test_nobody_is_forgotten_while_the_hub_does_not_say_so() -> None:
    async with serving("ann", "bob") as (_, engine, hub):
        engine.begin("ann")
        await looks(hub)
        hub.down, hub.names = True, ["bob"]
        await looks(hub, 3)
        assert "ann" in engine.running
        hub.down = False
        await eventually(lambda: not engine.volumes)


async def test_a_hub_that_has_lost_its_database_costs_no_files(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("ann", "bob", "carol", "dave") as (_, engine, hub):
        engine.begin("ann", "bob", "carol", "dave")
        await looks(hub)
        hub.names = ["dave"]
        await eventually(lambda: engine.running.keys() == {"dave"})
        await looks(hub)
        assert engine.volumes == {"ann", "bob", "carol", "dave"}
    assert "3 of 4 users vanished from the Hub at once" in caplog.text


async def test_who_holds_the_workspace_of_a_deleted_user_starts_nothing() -> None:
    async with serving("ann", "bob") as (service, engine, hub):
        held = service.workspaces.get("ann")
        await held.connect()
        await looks(hub)
        hub.names = ["bob"]
        await eventually(lambda: not engine.volumes)
        with pytest.raises(NotFound, match="not in the Hub any more"):
            await held.connect()
        assert not engine.running
        # Another user may get that name.
        assert service.workspaces.get("ann") is not held
        await service.workspaces.get("ann").connect()


async def test_a_deleted_users_token_is_believed_no_longer() -> None:
    async with serving("ann", "bob") as (service, engine, hub):
        await looks(hub)
        await service.workspaces.get("ann").connect()
        for name in ("ann", "bob"):
            assert await service.tokens.user(name) == {"name": name}
        service.tokens.hub_auth.revoked = "ann"
        assert await service.tokens.user("ann") == {"name": "ann"}
        hub.names = ["bob"]
        await eventually(lambda: not engine.running)
        assert await service.tokens.user("ann") is None
        service.tokens.hub_auth.revoked = "bob"
        assert await service.tokens.user("bob") == {"name": "bob"}


async def test_what_is_stopped_while_it_is_looked_at_is_not_started_again() -> None:
    async with serving("ann") as (service, engine, _):
        service.hub_interval = 60
        await asyncio.sleep(0.2)
        engine.begin("ann")
        listed = engine.containers

        async def late(user: str | None = None) -> list[Container]:
            found = await listed(user)
            if user is None:
                await service.remove("ann", volume=True, by="boss")
            return found

        engine.containers = late  # type: ignore[method-assign]
        await service.workspaces.adopt()
        assert not engine.running and not engine.volumes


async def test_the_administrators_page_waits_for_no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jupyter_agents.hub.service.PAGE_SECONDS", 0.2)
    async with serving("hang") as (service, engine, _):
        engine.begin("hang")
        service.workspaces.patience = 60
        service.workspaces.get("hang").container = engine.running["hang"]
        (listed,) = await asyncio.wait_for(service.list_workspaces(), 2)
        assert listed["user"] == "hang"


async def test_readiness_is_looked_for_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (service, engine, _):
        service.hub_interval = 60
        await asyncio.sleep(0.2)
        before = engine.checks
        assert set(await asyncio.gather(*(service.problem() for _ in range(50)))) == {None}
        assert engine.checks == before + 1
        engine.trouble = Unavailable("/secret/socket is gone.", "engine_unavailable")
        assert await service.problem() is None
        monkeypatch.setattr("jupyter_agents.hub.service.PROBLEM_SECONDS", 0)
        assert await service.problem() == "/secret/socket is gone."

"""All workspaces that this process serves, and the care for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from .errors import AgentsError
from .settings import Settings
from .workspace import Workspace


class Workspaces(Settings):
    """Workspaces by user name."""

    patience = 60.0  # seconds for which one workspace is waited for where others are looked after too

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._workspaces: dict[str, Workspace] = {}
        self._housekeeper: asyncio.Task[None] | None = None
        self.reaped = asyncio.Event()

    def get(self, user: str) -> Workspace:
        """The user's workspace. Nothing is started."""
        if user not in self._workspaces:
            self._workspaces[user] = Workspace(user, self)
        return self._workspaces[user]

    def __iter__(self) -> Iterator[Workspace]:
        return iter(list(self._workspaces.values()))

    def start(self, user: str | None = None) -> None:
        """Begin to look after workspaces, and reap orphans: of one user, or of all. `reaped` tells that it is done."""
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
        except Exception:
            self.log.exception("Orphaned workspaces can't be looked for")
        self.reaped.set()
        while True:
            await asyncio.sleep(min(10, max(0.1, self.cleanup_grace / 4)))
            await self.each(Workspace.look_after, self)

    async def each(
        self,
        do: Callable[[Workspace], Awaitable[object]],
        workspaces: Iterable[Workspace],
        patience: float | None = None,
        at_once: int | None = None,
    ) -> None:
        """Do something with each workspace: all at the same time, or so many of them.

        What fails, or takes longer than `patience` seconds, is logged and ends nothing for the others.
        """
        chosen = list(workspaces)
        patience = patience or self.patience
        turn = asyncio.Semaphore(at_once or len(chosen))

        async def try_with(workspace: Workspace) -> None:
            async with turn:
                try:
                    await asyncio.wait_for(do(workspace), patience)
                except asyncio.TimeoutError:
                    self.log.warning("%s did not answer within %g s", workspace.name, patience)
                except AgentsError as e:
                    self.log.warning("%s: %s", workspace.name, e)
                except Exception:
                    self.log.exception("Looking after %s failed", workspace.name)

        await asyncio.gather(*map(try_with, chosen))

    async def _reap(self, user: str | None) -> None:
        now = time.time()
        old = {c.user: c for c in await self.engine.containers(user) if now - c.started > self.orphan_age}

        async def reap(workspace: Workspace) -> None:
            if not workspace.watched:
                container = old[workspace.user]
                self.log.info("Reaping the orphan %s, unless it has an active run", container.name)
                await workspace.remove_if_idle(container)

        await self.each(reap, map(self.get, old), at_once=8)

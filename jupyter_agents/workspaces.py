"""All workspaces that this process serves, and the care for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from .errors import AgentsError
from .settings import Settings
from .workspace import Workspace


class Workspaces(Settings):
    """Workspaces by user name."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._workspaces: dict[str, Workspace] = {}
        self._housekeeper: asyncio.Task[None] | None = None

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
                try:
                    await workspace.remove_if_idle(container)
                except AgentsError as e:
                    self.log.warning("%s stays: %s", container.name, e)

"""The few calls that the service makes to the Hub, with its own token."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from tornado.httpclient import AsyncHTTPClient, HTTPClientError

from ..errors import Unavailable

PAGINATED = "application/jupyterhub-pagination+json"


class HubDown(Unavailable):
    """The Hub does not answer, or refuses with the HTTP status `code`. For administrators."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message, "hub_unavailable")
        self.code = code


class HubAPI:
    """`url` is the Hub's API, as in `JUPYTERHUB_API_URL`."""

    def __init__(self, url: str, token: str):
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"token {token}", "Accept": PAGINATED}

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = await AsyncHTTPClient().fetch(
                f"{self.url}/{path}",
                method=method,
                headers=self._headers,
                body=None if body is None else json.dumps(body),
            )
            return json.loads(response.body) if response.body else None
        except (HTTPClientError, OSError, ValueError) as e:
            raise HubDown(f"{method} {path}: {e}", getattr(e, "code", None)) from e

    async def own_scopes(self) -> set[str]:
        return set((await self.call("GET", "user"))["scopes"])

    async def users(self) -> dict[str, dict[str, Any]]:
        """All users by name, with their `groups` and `servers`.

        Some may be missing, as pages shift when somebody is deleted meanwhile.
        """
        found: dict[str, dict[str, Any]] = {}
        offset: int | None = 0
        while offset is not None:
            page = await self.call("GET", f"users?limit=200&offset={offset}")
            found |= {user["name"]: user for user in page["items"]}
            following = page["_pagination"]["next"]
            offset = following["offset"] if following else None
        return found

    async def has_user(self, name: str) -> bool:
        try:
            await self.call("GET", f"users/{quote(name, safe='')}")
        except HubDown as e:
            if e.code == 404:
                return False
            raise
        return True

    async def report_activity(self, user: dict[str, Any]) -> None:
        """Say that the user, and all servers that run for them, are active now."""
        now = {"last_activity": datetime.now(timezone.utc).isoformat()}
        servers = {name: now for name, server in user.get("servers", {}).items() if server["ready"]}
        await self.call("POST", f"users/{quote(user['name'], safe='')}/activity", {**now, "servers": servers})

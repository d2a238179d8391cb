"""For administrators: all workspaces as a page and as JSON; health and metrics for machines."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from jupyter_server.utils import url_path_join
from jupyterhub.services.auth import HubOAuthCallbackHandler, HubOAuthenticated
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from tornado import template, web

from ..errors import AgentsError

if TYPE_CHECKING:
    from .service import AgentsHub

PAGE = template.Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Agent workspaces</title>
<style>
:root { color-scheme: light dark; }
body { font: 14px system-ui, sans-serif; margin: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
[role=alert] { border-left: 4px solid #d32f2f; padding-left: .6rem; }
form { display: inline; }
</style>
</head>
<body>
<h1>Agent workspaces</h1>
{% if problem %}<p role="alert">{{ problem }}</p>{% end %}
<p>{{ sum(w["started"] is not None for w in workspaces) }} of {{ len(workspaces) }} running.
A stopped workspace keeps its files.</p>
<table>
<thead><tr><th>User</th><th class="number">Memory</th><th class="number">Agents</th><th class="number">Runs</th>
<th class="number">Age</th><th>Actions</th></tr></thead>
<tbody>
{% for w in workspaces %}
<tr>
<td>{{ w["user"] }}{% if not w["in_hub"] %} <em>(not in the Hub)</em>{% end %}</td>
{% if w["started"] is None %}
<td class="number" colspan="4">{{ w["state"] }}</td>
{% else %}
<td class="number">{{ memory(w) }}</td>
<td class="number">{{ w["agents"] }}</td>
<td class="number">{{ w["active_runs"] }}</td>
<td class="number">{{ age(w["started"]) }}</td>
{% end %}
<td><form method="post">{% raw xsrf %}<input type="hidden" name="user" value="{{ w["user"] }}">
{% if w["started"] is not None %}<button name="action" value="stop">Stop</button>{% end %}
<button name="action" value="ask">Delete with its files…</button></form></td>
</tr>
{% end %}
</tbody>
</table>
</body>
</html>
"""
)
ASK = template.Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Delete a workspace</title></head>
<body><h1>Delete all agents and files of {{ user }}?</h1>
<p>This can't be undone.</p>
<form method="post">{% raw xsrf %}<input type="hidden" name="user" value="{{ user }}">
<button name="action" value="delete">Delete</button> <a href="{{ back }}">Keep them</a></form>
</body></html>
"""
)
CSP = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"


def memory(workspace: dict[str, Any]) -> str:
    used = f"{workspace['memory']['used_bytes'] / 2**20:.0f}" if workspace["memory"] else "?"
    return f"{used} of {workspace['limits']['memory_bytes'] / 2**20:.0f} MB"


def age(started: float) -> str:
    minutes = int((time.time() - started) / 60)
    return f"{minutes // 1440} d {minutes // 60 % 24} h" if minutes >= 1440 else f"{minutes // 60} h {minutes % 60} min"


class PublicHandler(web.RequestHandler):
    """For anybody."""

    @property
    def service(self) -> AgentsHub:
        service: AgentsHub = self.settings["agents_hub"]
        return service


class AdminHandler(HubOAuthenticated, PublicHandler):
    """For who holds the admin scope: by a token, or by the cookie of a login at the Hub with its XSRF token."""

    @property
    def hub_scopes(self) -> set[str]:
        return {self.service.admin_scope}

    def set_default_headers(self) -> None:
        self.set_header("Content-Security-Policy", CSP)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        # Asked for here: `get_current_user` would hold up everybody while it waits for the Hub.
        user = await self.hub_auth.get_user(self, sync=False)
        if user and not self.hub_auth.check_scopes(self.hub_scopes, user):
            needed = " or ".join(sorted(self.hub_scopes))
            raise web.HTTPError(403, f"This needs the scope {needed}, which {user['name']} does not have here.")
        if self.request.method not in ("GET", "HEAD"):
            self.check_xsrf_cookie()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None))[1]
        if isinstance(error, AgentsError):
            self.set_status(error.status)
            self.finish(error.to_dict())
        else:
            message = getattr(error, "log_message", None) or self._reason
            self.finish({"message": message, "reason": str(status_code)})


class PageHandler(AdminHandler):
    """The page, and the buttons on it."""

    @web.authenticated
    async def get(self) -> None:
        await self._show()

    @web.authenticated
    async def post(self) -> None:
        user, action = self.get_body_argument("user", strip=False), self.get_body_argument("action")
        if action == "ask":
            self.finish(ASK.generate(user=user, xsrf=self.xsrf_form_html(), back=self.settings["base_url"]))
            return
        await self.service.remove(user, volume=action == "delete", by=self.current_user["name"])
        self.redirect(self.settings["base_url"])

    async def _show(self) -> None:
        self.finish(
            PAGE.generate(
                workspaces=await self.service.list_workspaces(),
                problem=await self.service.problem(),
                xsrf=self.xsrf_form_html(),
                memory=memory,
                age=age,
            )
        )


class JSONHandler(AdminHandler):
    def get_login_url(self) -> str:
        raise web.HTTPError(403, "This needs a token of JupyterHub with the scope " + " or ".join(self.hub_scopes))


class WorkspacesHandler(JSONHandler):
    """`GET`: all workspaces, also the stopped ones."""

    @web.authenticated
    async def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(await self.service.list_workspaces()))


class WorkspaceHandler(JSONHandler):
    """`DELETE`: stop a user's workspace; `?volume=1` also deletes all agents and files."""

    @web.authenticated
    async def delete(self, user: str) -> None:
        volume = self.get_query_argument("volume", "0") == "1"
        await self.service.remove(user, volume, by=self.current_user["name"])
        self.set_status(204)


class MetricsHandler(JSONHandler):
    @property
    def hub_scopes(self) -> set[str]:
        return {self.service.admin_scope, "read:metrics"}

    @web.authenticated
    async def get(self) -> None:
        self.set_header("Content-Type", CONTENT_TYPE_LATEST)
        self.finish(generate_latest(self.service.workspaces.metrics.registry))


class HealthHandler(PublicHandler):
    """The process answers."""

    def get(self) -> None:
        self.finish({"status": "ok"})


class ReadyHandler(PublicHandler):
    """Hub and engine answer, too. What is wrong is told to administrators only, on their page and in the log."""

    async def get(self) -> None:
        problem = await self.service.problem()
        self.set_status(503 if problem else 200)
        self.finish({"status": "not ready" if problem else "ok"})


def routes(prefix: str) -> list[tuple[str, type[web.RequestHandler]]]:
    """The application's settings must hold the service as `agents_hub`."""

    def at(path: str) -> str:
        return url_path_join(prefix, path)

    return [
        (at("/"), PageHandler),
        (at("oauth_callback"), HubOAuthCallbackHandler),
        (at("workspaces"), WorkspacesHandler),
        (at("workspaces/([^/]+)"), WorkspaceHandler),
        (at("health"), HealthHandler),
        (at("ready"), ReadyHandler),
        (at("metrics"), MetricsHandler),
    ]

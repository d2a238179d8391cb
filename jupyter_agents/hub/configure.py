"""One call for `jupyterhub_config.py`. It runs in the Hub, so it imports nothing of the service."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from traitlets.config import Config
from traitlets.config.loader import LazyConfigValue

SERVICE = "jupyter-agents"
ADMIN_SCOPE = "custom:jupyter-agents:admin"
# What the service asks of the Hub: who exists and in which groups, which servers they run, and to report activity.
SERVICE_SCOPES = ["list:users", "read:users:groups", "read:servers", "users:activity"]
# The Hub's own scopes of a server's token, which naming any replaces.
SERVER_SCOPES = ["users:activity!user", "access:servers!server"]


def access_scope(service: str = SERVICE) -> str:
    """The scope that a token must carry to be let in."""
    return f"access:services!service={service}"


def configure(
    c: Config,
    *,
    name: str = SERVICE,
    url: str = "http://127.0.0.1:10901",
    admins: Iterable[str] = (),
    admin_groups: Iterable[str] = (),
    args: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    api_token: str | None = None,
) -> None:
    """Add the service, its roles and scopes to a Hub's configuration; what is there stays.

    Call it at the end of `jupyterhub_config.py`, so that nothing set later replaces what it added.

    `url` is where the service listens and must be reachable from the users' servers and the proxy. `admins` and
    members of `admin_groups` may see and stop all workspaces. `args` and `environment` go to the service's process.
    With `api_token` the service is an external one: you run `jupyter agents hub` yourself with that token.
    """
    from jupyterhub.services.service import Service

    # Else the Hub writes it to its database as well, in plain text, with the API key that may be in it.
    Service.environment.tag(in_db=False)

    access = access_scope(name)
    hub, spawner = c.JupyterHub, c.Spawner

    service: dict[str, Any] = {
        "name": name,
        "url": url,
        "oauth_client_allowed_scopes": [ADMIN_SCOPE],
        "oauth_no_confirm": True,
    }
    if api_token:
        service["api_token"] = api_token
    else:
        service["command"] = [sys.executable, "-m", "jupyter_agents.hub", "--managed", *args]
        service["environment"] = dict(environment or {})
    hub.services = [*_value(hub, "services", []), service]

    roles = {role["name"]: dict(role) for role in _value(hub, "load_roles", [])}
    user = roles.setdefault("user", {"name": "user"})
    user["scopes"] = [*user.get("scopes", ["self"]), access]
    roles[f"{name}-service"] = {"name": f"{name}-service", "scopes": SERVICE_SCOPES, "services": [name]}
    admin = {"name": f"{name}-admin", "scopes": [ADMIN_SCOPE, access]}
    # An authenticator that manages roles refuses a role with members here, so name members only where there are any.
    admin |= {kind: sorted(who) for kind, who in (("users", admins), ("groups", admin_groups)) if who}
    roles[admin["name"]] = admin
    hub.load_roles = list(roles.values())
    hub.custom_scopes = {
        **_value(hub, "custom_scopes", {}),
        ADMIN_SCOPE: {"description": "See, stop and delete every user's agent workspace"},
    }

    spawner.server_token_scopes = _with_scope(
        _value(spawner, "server_token_scopes", []) or roles.get("server", {}).get("scopes", SERVER_SCOPES), access
    )
    spawner.environment = {
        **_value(spawner, "environment", {}),
        "JUPYTER_AGENTS_SERVICE_URL": f"{url.rstrip('/')}{_base_url(hub)}services/{name}/",
    }


def _with_scope(scopes: list[str] | Callable[[Any], list[str]], scope: str) -> Any:
    if callable(scopes):
        return lambda spawner: [*scopes(spawner), scope]
    return [*scopes, scope]


def _base_url(hub: Config) -> str:
    """The Hub's public prefix, from `bind_url` or `base_url`, with a slash at both ends."""
    from urllib.parse import urlsplit

    path = urlsplit(_value(hub, "bind_url", "")).path.strip("/") or _value(hub, "base_url", "").strip("/")
    return f"/{path}/" if path else "/"


def _value(section: Config, key: str, unset: Any) -> Any:
    """A setting as it is so far; `c.A.b.append(...)` leaves a lazy value behind."""
    value = section.get(key, unset)
    return value.get_value(unset) if isinstance(value, LazyConfigValue) else value

"""`configure` adds to a configuration, in whatever way that was written before."""

from __future__ import annotations

from typing import Any

from traitlets.config import Config

from jupyter_agents.hub import configure

ACCESS = "access:services!service=jupyter-agents"


def role(c: Config, name: str) -> dict[str, Any]:
    (found,) = [role for role in c.JupyterHub.load_roles if role["name"] == name]
    return dict(found)


def test_an_empty_configuration_gets_all_that_is_needed() -> None:
    c = Config()
    configure(c, admins={"boss"})
    (service,) = c.JupyterHub.services
    assert service["url"] == "http://127.0.0.1:10901" and service["command"][1:3] == ["-m", "jupyter_agents.hub"]
    assert role(c, "user")["scopes"] == ["self", ACCESS]
    assert role(c, "jupyter-agents-service")["services"] == ["jupyter-agents"]
    assert role(c, "jupyter-agents-admin")["users"] == ["boss"]
    assert ACCESS in c.Spawner.server_token_scopes
    # Naming scopes replaces the Hub's own, without which a server can't report that it is alive.
    assert {"users:activity!user", "access:servers!server"} < set(c.Spawner.server_token_scopes)
    assert c.Spawner.environment == {
        "JUPYTER_AGENTS_SERVICE_URL": "http://127.0.0.1:10901/services/jupyter-agents/",
    }


def test_what_is_there_stays() -> None:
    c = Config()
    c.JupyterHub.bind_url = "https://hub.example.org/base/"
    c.JupyterHub.services = [{"name": "culler"}]
    c.JupyterHub.load_roles.append({"name": "user", "scopes": ["self", "shares!user"]})
    c.JupyterHub.load_roles.append({"name": "server", "scopes": ["users:activity!user"]})
    c.JupyterHub.custom_scopes = {"custom:x:y": {"description": "y"}}
    c.Spawner.environment.update({"LANG": "C.UTF-8"})
    configure(c, url="http://hub:10901/")
    assert [service["name"] for service in c.JupyterHub.services] == ["culler", "jupyter-agents"]
    assert role(c, "user")["scopes"] == ["self", "shares!user", ACCESS]
    assert "users" not in role(c, "jupyter-agents-admin")
    assert set(c.JupyterHub.custom_scopes) == {"custom:x:y", "custom:jupyter-agents:admin"}
    assert c.Spawner.server_token_scopes == ["users:activity!user", ACCESS]
    assert c.Spawner.environment == {
        "LANG": "C.UTF-8",
        "JUPYTER_AGENTS_SERVICE_URL": "http://hub:10901/base/services/jupyter-agents/",
    }


def test_scopes_by_a_function_get_ours_too() -> None:
    c = Config()
    c.Spawner.server_token_scopes = lambda spawner: [f"read:users!user={spawner}"]
    configure(c)
    assert c.Spawner.server_token_scopes("ann") == ["read:users!user=ann", ACCESS]


def test_an_external_service_has_a_token_and_no_command() -> None:
    c = Config()
    configure(c, api_token="secret")
    (service,) = c.JupyterHub.services
    assert service["api_token"] == "secret" and "command" not in service

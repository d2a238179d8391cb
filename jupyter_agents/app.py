"""The server extension: settings, wiring, start and stop."""

from __future__ import annotations

import getpass
import os
import secrets
from pathlib import Path
from typing import Any

from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyter_server.extension.application import ExtensionApp
from traitlets import Unicode, default

from . import handlers
from .docker_engine import DockerEngine
from .workspaces import Workspaces

AUDIT_SCHEMA = Path(__file__).parent / "audit.yaml"
AUDIT_ID = "https://events.jupyter-agents.org/audit"


class JupyterAgents(ExtensionApp):
    """Claude agents in one capped workspace container per user."""

    name = "jupyter_agents"
    extension_url = "/lab"
    load_other_extensions = True
    classes = [Workspaces, DockerEngine]  # noqa: RUF012 - as traitlets has it

    user = Unicode(help="Whose workspace it is. Default: the user that the server runs as.").tag(config=True)

    service_url = Unicode(
        help="On a JupyterHub: address of the Hub service, which calls are passed on to. Default: what the Hub told."
    ).tag(config=True)

    @default("service_url")
    def _default_service_url(self) -> str:
        return os.environ.get("JUPYTER_AGENTS_SERVICE_URL", "")

    @default("user")
    def _default_user(self) -> str:
        return getpass.getuser()

    def initialize_settings(self) -> None:
        if self.service_url:
            from .hub.forward import Forwarder

            token = os.environ.get("JUPYTERHUB_API_TOKEN", "")
            self.forwarder = self.settings["jupyter_agents_forwarder"] = Forwarder(self.service_url, token)
            # On a Hub the server has no token of its own; kernels find it with the Hub's.
            os.environ["JUPYTER_AGENTS_TOKEN"] = token
            return
        assert self.serverapp is not None and self.serverapp.event_logger is not None
        identity = self.serverapp.identity_provider
        if isinstance(identity, PasswordIdentityProvider) and identity.auth_enabled and not identity.token:
            # Kernels don't know the password. This token is as good as what a server has by default, and in the same
            # file, which only its user can read.
            identity.token = secrets.token_hex(24)
        self.serverapp.event_logger.register_event_schema(AUDIT_SCHEMA)
        self.workspaces = Workspaces(parent=self, audit=self._audit)
        self.settings["jupyter_agents"] = lambda user: self.workspaces.get(self.user)

    def _audit(self, event: dict[str, Any]) -> None:
        assert self.serverapp is not None and self.serverapp.event_logger is not None
        self.serverapp.event_logger.emit(schema_id=AUDIT_ID, data=event)

    def initialize_handlers(self) -> None:
        if self.service_url:
            from .hub import forward

            self.handlers.extend(forward.routes(""))
        else:
            self.handlers.extend(handlers.routes(""))

    async def _start_jupyter_server_extension(self, serverapp: Any) -> None:
        """Called by the server when its loop runs."""
        if not self.service_url:
            self.workspaces.start(self.user)

    async def stop_extension(self) -> None:
        await (self.forwarder.close() if self.service_url else self.workspaces.stop())

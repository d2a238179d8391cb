"""Print the settings of README.md as a Markdown table; tests/test_docs.py holds it against the file."""

from __future__ import annotations

from jupyter_server.extension.application import ExtensionApp
from traitlets import Container
from traitlets.config import Configurable

from jupyter_agents.app import JupyterAgents
from jupyter_agents.docker_engine import DockerEngine
from jupyter_agents.workspaces import Workspaces

CLASSES: list[type[Configurable]] = [JupyterAgents, Workspaces, DockerEngine]
COMPUTED = {
    "user": "the user that the server runs as",
    "ca_bundle": "`$SSL_CERT_FILE`",
    "service_url": "what the Hub told",
}


def table() -> str:
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for cls in CLASSES:
        inherited = ExtensionApp.class_traits(config=True) if cls is JupyterAgents else {}
        for name, trait in sorted(cls.class_traits(config=True).items()):
            if name in inherited:
                continue
            default = COMPUTED.get(name) or f"`{trait.default()!r}`"
            if isinstance(trait, Container) and trait.default():
                default = ", ".join(f"`{value}`" for value in trait.default() or [])
            elif name == "engine_class":
                default = "`DockerEngine`"
            lines.append(f"| `{cls.__name__}.{name}` | {default} | {' '.join(trait.help.split())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

"""What applies to all workspaces that a process serves: its configuration, its engine, where audit events go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from traitlets import Bool, Dict, Float, Int, List, Type, Unicode
from traitlets.config import LoggingConfigurable

from . import environment
from .docker_engine import DockerEngine
from .engine import Engine, Limits
from .errors import AgentsError


class Settings(LoggingConfigurable):
    engine_class = Type(DockerEngine, Engine, help="Where workspaces live.").tag(config=True)
    memory_limit = Int(2**30, help="Memory of a workspace, in bytes; no swap comes on top.").tag(config=True)
    memory_warning = Int(800 * 2**20, help="Warn from this use of memory on, in bytes.").tag(config=True)
    cpu_limit = Float(1.0, help="CPUs of a workspace.").tag(config=True)
    pids_limit = Int(512, help="Processes and threads of a workspace.").tag(config=True)
    max_agents = Int(10, help="Agents of a user.").tag(config=True)
    max_runs = Int(3, help="Runs of a user at the same time.").tag(config=True)
    isolate_agents = Bool(
        True,
        help="Give each agent a uid of its own, so that a user's agents can't read each other's files. "
        "If False, all new agents share the uid of the image's user `claude`.",
    ).tag(config=True)
    cleanup_grace = Float(
        120, help="Seconds for which an idle workspace that nobody watches is kept before its container is removed."
    ).tag(config=True)
    orphan_age = Float(
        24 * 3600, help="At start, remove workspaces without an active run that are older than this, in seconds."
    ).tag(config=True)
    run_timeout = Float(4 * 3600, help="Seconds that a run may take unless it asks for another time; 0: any.").tag(
        config=True
    )
    run_idle_timeout = Float(1800, help="End a run after this many seconds without any event; 0: never.").tag(
        config=True
    )
    run_linger = Float(10, help="End a run this many seconds after Claude's result if it doesn't end itself.").tag(
        config=True
    )
    max_upload = Int(10 * 2**30, help="Largest file that can be uploaded, in bytes.").tag(config=True)
    pass_environment = List(
        Unicode(),
        environment.PASSED_ON,
        help="Names of variables of the server's environment that runs get. Nothing else of it reaches them.",
    ).tag(config=True)
    environment = Dict(
        Unicode(),
        help="Further variables for all runs. They win over the server's; an agent's own `.env` wins over all.",
    ).tag(config=True)

    def __init__(self, audit: Callable[[dict[str, Any]], None] = lambda event: None, **kwargs: Any):
        super().__init__(**kwargs)
        self.audit = audit
        self.engine: Engine = self.engine_class(parent=self)  # type: ignore[abstract]

    def engine_failed(self, error: AgentsError) -> None:
        """Called when a workspace becomes unavailable. For a subclass that counts."""

    def limits_for(self, user: str) -> Limits:
        return Limits(
            memory_bytes=self.memory_limit,
            memory_warning_bytes=self.memory_warning,
            cpu=self.cpu_limit,
            pids=self.pids_limit,
            agents=self.max_agents,
            runs=self.max_runs,
        )

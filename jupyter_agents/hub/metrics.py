"""What the service tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..workspaces import Workspaces


class Metrics(Collector):
    """Counters are kept here, gauges are read from the workspaces when somebody asks."""

    def __init__(self, workspaces: Workspaces):
        self.registry = CollectorRegistry()
        self.runs = Counter("jupyter_agents_runs", "Runs that have ended", ["outcome"], registry=self.registry)
        self.engine_errors = Counter(
            "jupyter_agents_engine_errors", "Times that a workspace got unavailable", ["reason"], registry=self.registry
        )
        self._workspaces = workspaces
        self.registry.register(self)

    def collect(self) -> Iterator[Any]:
        running = [workspace for workspace in self._workspaces if workspace.container]
        for name, text, value in [
            ("workspaces", "Workspaces that run", len(running)),
            ("active_runs", "Runs going on", sum(len(w.active_runs) for w in running)),
            ("memory_bytes", "Memory in use", sum(w.memory["used_bytes"] for w in running if w.memory)),
            ("memory_limit_bytes", "Memory that may be used", sum(w.limits.memory_bytes for w in running)),
        ]:
            yield GaugeMetricFamily(f"jupyter_agents_{name}", text, value)

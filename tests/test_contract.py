"""The running server against its own OpenAPI document."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from conftest import Server
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import missing_required_header, positive_data_acceptance, unsupported_method

from jupyter_agents import contract
from jupyter_agents.agents import AGENT_ID

# A WebSocket is no call.
schema = schemathesis.openapi.from_dict(contract.document()).exclude(operation_id=["events"])


@schema.hook
def filter_query(context: Any, query: dict[str, Any] | None) -> bool:
    """Parameters that we don't know are ignored, as is usual; it would have them refused."""
    return set(query or {}) <= {parameter.name for parameter in context.operation.query}


@schema.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_server_keeps_its_contract(case: schemathesis.Case, server: Server) -> None:
    if re.fullmatch(AGENT_ID, str(case.path_parameters.get("agent", ""))):
        case.path_parameters["agent"] = "demo"  # one that there is, so that calls come further than to 404
        with server.session() as session:
            assert session.post(server.url("agents"), json={"id": "demo"}).status_code in (201, 409)
    # Jupyter says 403 where the first would have 401; tornado tells no `Allow` with a 405.
    excluded = [missing_required_header, unsupported_method]
    if "path" in case.path_parameters:
        excluded.append(positive_data_acceptance)  # what a path may be is more than a schema can say
    case.call_and_validate(
        base_url=server.base_url.rstrip("/"),
        headers={"Authorization": f"token {server.token}"},
        excluded_checks=excluded,
    )

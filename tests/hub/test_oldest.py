"""The oldest JupyterHub that we claim."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from .running import ROOT, Hub, User, wait_for
from .test_service import (
    test_a_login_cookie_is_no_way_into_the_api,
    test_a_missing_scope_is_named_to_the_user_and_in_the_log,
    test_limits_of_groups_and_users_hold,
    test_the_admin_page_is_for_those_who_have_the_scope,
    test_wrong_credentials_are_refused_everywhere,
)
from .test_users import IN_A_KERNEL, test_the_browsers_cookie_needs_its_xsrf_token_and_its_origin

__all__ = [
    "test_a_login_cookie_is_no_way_into_the_api",
    "test_a_missing_scope_is_named_to_the_user_and_in_the_log",
    "test_limits_of_groups_and_users_hold",
    "test_the_admin_page_is_for_those_who_have_the_scope",
    "test_the_browsers_cookie_needs_its_xsrf_token_and_its_origin",
    "test_wrong_credentials_are_refused_everywhere",
]

OLDEST = ROOT / ".dev" / "hub-oldest" / "bin" / "python"


@pytest.fixture(scope="module")
def hub(start_hub: Callable[..., Hub]) -> Iterator[Hub]:
    assert OLDEST.exists(), "`make .dev/oldest` makes it"
    hub = start_hub(str(OLDEST), 'c.AgentsHub.deleted_users = "delete"')
    assert requests.get(f"{hub.url}/hub/api").json()["version"] == "5.0.0"
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def users(hub: Hub) -> list[User]:
    """One will do."""
    return hub.add_users("old-uma")


def test_a_kernel_has_its_users_workspace(users: list[User]) -> None:
    told = json.loads(users[0].execute(IN_A_KERNEL))
    assert told["user"] == "old-uma" and "I am with /workspace/agent-k" in told["text"]


def test_the_volume_of_a_deleted_user_can_go_too(hub: Hub, deployment: str, docker_api: Any) -> None:
    ann = hub.add_user("gone-too-ann")
    ann.direct.create_agent("a")
    labels = [f"jupyter-agents.deployment={deployment}", "jupyter-agents.user=gone-too-ann"]
    assert docker_api.volumes(filters={"label": labels})["Volumes"]
    hub.wait_for_look()
    assert hub.api("DELETE", ann.path).status_code == 204
    wait_for(lambda: not docker_api.volumes(filters={"label": labels})["Volumes"], "the volume is gone")

"""Errors whose text is safe to show a user, each with its HTTP status."""

from __future__ import annotations

from typing import Any


class AgentsError(Exception):
    """What went wrong and what to do, in one sentence.

    `reason` is a stable word for programs, `command` a shell command that mends it. Handlers translate only this class.
    """

    status = 400

    def __init__(self, message: str, reason: str, command: str | None = None):
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.command = command

    def to_dict(self) -> dict[str, Any]:
        body = {"message": self.message, "reason": self.reason}
        return {**body, "command": self.command} if self.command else body


class BadRequest(AgentsError):
    status = 400


class Protected(AgentsError):
    status = 403


class NotFound(AgentsError):
    status = 404


class Conflict(AgentsError):
    status = 409


class TooLarge(AgentsError):
    status = 413


class Unavailable(AgentsError):
    status = 503


class Stuck(Unavailable):
    """Something in the workspace holds up what was asked of it."""

    def __init__(self) -> None:
        super().__init__(
            "The workspace does not get done what it was asked: try again, or stop it if that does not help.",
            "workspace_stuck",
        )


class DiskFull(AgentsError):
    status = 507


class ContainerGone(Unavailable):
    """The container has stopped or been removed; asking for it again makes a new one."""

    def __init__(self) -> None:
        super().__init__("The workspace has stopped; try again to start it anew.", "workspace_lost")

"""Who calls: the Hub says it of each token, and this service's access scope must be among the token's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from jupyter_server.auth import IdentityProvider, User
from jupyterhub.services.auth import HubAuth
from tornado import web
from traitlets import Float, Instance
from traitlets.config import LoggingConfigurable

Model = dict[str, Any]


class TokenCache(LoggingConfigurable):
    """The Hub's answers on tokens, each kept for a short and stated time."""

    accepted = Float(60, help="Seconds for which an accepted token works on after it was revoked.").tag(config=True)
    refused = Float(5, help="Seconds for which a refused token is refused without asking the Hub.").tag(config=True)

    hub_auth = Instance(HubAuth)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._answers: dict[str, tuple[float, Model | None]] = {}

    async def user(self, token: str) -> Model | None:
        """The Hub's model of the token's owner, None when the Hub doesn't know it. Raises 503 with the Hub down."""
        key = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        now = time.monotonic()
        model: Model | None
        expires, model = self._answers.get(key, (0.0, None))
        if now < expires:
            return model
        try:
            model = await self.hub_auth.user_for_token(token, use_cache=False, sync=False)
        except web.HTTPError as e:
            self.log.warning("The Hub does not answer: %s", e.log_message)
            raise web.HTTPError(503, "JupyterHub does not answer, try again soon.", reason="service_unavailable") from e
        now = time.monotonic()
        self._answers = {k: a for k, a in self._answers.items() if now < a[0]}
        self._answers[key] = (now + (self.accepted if model else self.refused), model)
        return model

    def forget(self, user: str) -> None:
        """Ask the Hub again about all tokens of a user."""
        self._answers = {k: (e, model) for k, (e, model) in self._answers.items() if not model or model["name"] != user}


class HubIdentity(IdentityProvider):
    """Identity of API callers: users by a Hub token in the header, never by a cookie, never services."""

    def __init__(self, tokens: TokenCache, access_scope: str, seen: Callable[[Model], None], **kwargs: Any):
        """`seen` is told of each caller."""
        super().__init__(**kwargs)
        self.tokens = tokens
        self.hub_auth = tokens.hub_auth
        self.access_scope = access_scope
        self.seen = seen
        self._without_scope: set[str] = set()

    async def get_user(self, handler: web.RequestHandler) -> User | None:
        match = HubAuth.auth_header_pat.fullmatch(handler.request.headers.get("Authorization", ""))
        model = await self.tokens.user(match[1]) if match else None
        if model is None:
            raise web.HTTPError(403, "This call needs a valid token of JupyterHub.", reason="not_authenticated")
        if model.get("kind") != "user":
            raise web.HTTPError(403, "Only users have workspaces, this is a service's token.", reason="not_a_user")
        if not self.hub_auth.check_scopes({"access:services", self.access_scope}, model):
            if model["name"] not in self._without_scope:
                self._without_scope.add(model["name"])
                self.log.warning(
                    "A token of %s lacks the scope %s: grant it to the role `user` and c.Spawner.server_token_scopes, "
                    "as jupyter_agents.hub.configure(c) does; servers started before need a restart.",
                    model["name"],
                    self.access_scope,
                )
            raise web.HTTPError(
                403,
                f"Your token lacks the scope {self.access_scope}: restart your server, and tell your administrator "
                "if that does not help.",
                reason="missing_scope",
            )
        handler._token_authenticated = True  # type: ignore[attr-defined]
        self.seen(model)
        return User(username=model["name"])

    def is_token_authenticated(self, handler: web.RequestHandler) -> bool:
        return getattr(handler, "_token_authenticated", False)

    def should_check_origin(self, handler: web.RequestHandler) -> bool:
        return not self.is_token_authenticated(handler)

"""On a Hub, the user's own server passes each call on to the service, with the user's Hub token.

Not jupyter-server-proxy: its handlers hold a whole request and a whole answer in memory, give up after 300 s
and lose WebSocket close codes, while runs are followed for hours and files may be as big as the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl, urlencode

import aiohttp
from jupyter_core.utils import ensure_async
from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.auth.utils import HTTP_METHOD_TO_AUTH_ACTION
from jupyter_server.base.websocket import WebSocketMixin
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler
from yarl import URL

from ..errors import Unavailable
from ..handlers import MAX_MESSAGE, AgentsHandler, StreamedHandler

# Nothing else crosses: not the cookies and the token of the browser, not the service's idea of other origins.
REQUEST_HEADERS = ("Accept", "Content-Type", "Content-Length")
RESPONSE_HEADERS = (
    "Content-Type",
    "Content-Length",
    "Content-Disposition",
    "Content-Security-Policy",
    "Cache-Control",
    "ETag",
    "Last-Modified",
    "Retry-After",
)


class ServiceDown(Unavailable):
    def __init__(self) -> None:
        message = "The agent service of this Hub does not answer; tell your administrator if it stays so."
        super().__init__(message, "service_unavailable")


class Forwarder:
    """The way to the service: its address with its prefix, the user's token and a pool of connections."""

    _session: aiohttp.ClientSession | None = None

    def __init__(self, url: str, token: str):
        self.url = url
        self._token = token

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:  # not earlier: it belongs to the running event loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # each followed run holds a connection
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                headers={"Authorization": f"token {self._token}"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("Accept-Encoding", "User-Agent"),
            )
        return self._session

    def target(self, path: str, query: str) -> URL:
        """Where a call goes; `path` stays percent-encoded as it came, credentials in the query are dropped."""
        kept = [(k, v) for k, v in parse_qsl(query, keep_blank_values=True) if k not in ("token", "_xsrf")]
        address = url_path_join(self.url, "jupyter-agents", path) + (f"?{urlencode(kept)}" if kept else "")
        return URL(address, encoded=True)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Forwarding(AgentsHandler):
    @property
    def forwarder(self) -> Forwarder:
        forwarder: Forwarder = self.settings["jupyter_agents_forwarder"]
        return forwarder

    @property
    def target(self) -> URL:
        prefix = url_path_join(self.base_url, "jupyter-agents")
        return self.forwarder.target(self.request.path[len(prefix) :], self.request.query)


@web.stream_request_body
class ForwardHandler(_Forwarding, StreamedHandler):
    """Any HTTP call. Bodies pass through in both directions, a slow end slows the other one down."""

    _answer: asyncio.Task[None] | None = None

    async def admit(self) -> None:
        # What the decorators below do, but before the first byte is passed on.
        action = HTTP_METHOD_TO_AUTH_ACTION[self.request.method or "GET"]
        if not self.current_user or not await ensure_async(
            self.authorizer.is_authorized(self, self.current_user, action, self.auth_resource)
        ):
            raise web.HTTPError(403)
        self.request.connection.set_max_body_size(1 << 62)  # type: ignore[union-attr]  # the service has the limit
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._answer = asyncio.create_task(self._forward())

    async def data_received(self, chunk: bytes) -> None:
        if self._answer:
            await self._send(chunk)

    async def _send(self, chunk: bytes) -> None:
        """Give the service a piece of the body, unless it has answered without wanting it; an empty one ends it."""
        assert self._answer
        put = asyncio.create_task(self._chunks.put(chunk))
        await asyncio.wait({put, self._answer}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()

    async def _body(self) -> AsyncIterator[bytes]:
        while chunk := await self._chunks.get():
            yield chunk

    async def _forward(self) -> None:
        has_body = "Content-Length" in self.request.headers or "Transfer-Encoding" in self.request.headers
        try:
            async with self.forwarder.session.request(
                self.request.method or "GET",
                self.target,
                data=self._body() if has_body else None,
                headers={k: self.request.headers[k] for k in REQUEST_HEADERS if k in self.request.headers},
                allow_redirects=False,
            ) as response:
                self.set_status(response.status, response.reason)
                for name in RESPONSE_HEADERS:
                    if name in response.headers:
                        self.set_header(name, response.headers[name])
                async for chunk in response.content.iter_any():
                    self.write(chunk)
                    await self.flush()
        except aiohttp.ClientError as e:
            self.log.warning("The agent service does not answer: %s", e)
            raise ServiceDown from e
        except StreamClosedError:
            pass  # the client has gone

    async def pass_on(self) -> None:
        assert self._answer
        await self._send(b"")
        with contextlib.suppress(asyncio.CancelledError):  # the client has gone
            await self._answer

    def on_connection_close(self) -> None:
        if self._answer:
            self._answer.cancel()
        super().on_connection_close()

    @web.authenticated
    @authorized
    async def get(self, path: str) -> None:
        await self.pass_on()

    post = put = patch = delete = get


class ForwardSocket(WebSocketMixin, WebSocketHandler, _Forwarding):
    """The WebSocket `events`: messages and close codes pass through in both directions."""

    max_message_size = MAX_MESSAGE
    _upstream: aiohttp.ClientWebSocketResponse[Any] | None = None

    @ws_authenticated
    @authorized("execute")
    async def get(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        # Connect first: a refusal by the service is then seen as the refusal that it is.
        try:
            upstream = self._upstream = await self.forwarder.session.ws_connect(
                self.target, heartbeat=30, max_msg_size=0
            )
        except aiohttp.WSServerHandshakeError as e:
            raise web.HTTPError(e.status) from e
        except aiohttp.ClientError as e:
            raise ServiceDown from e
        await super().get(*args, **kwargs)
        if self.ws_connection is None:
            await upstream.close()

    def open(self, *args: Any, **kwargs: Any) -> None:
        super().open(*args, **kwargs)
        self._pump = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        assert self._upstream
        with contextlib.suppress(WebSocketClosedError):
            while True:
                message = await self._upstream.receive()
                if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    break
                await self.write_message(message.data, binary=message.type == aiohttp.WSMsgType.BINARY)
            if message.type == aiohttp.WSMsgType.CLOSE:
                self.close(message.data, message.extra)
            else:
                self.close(1012)  # there was no close frame: the service has gone, "service restart"

    async def on_message(self, message: str | bytes) -> None:
        assert self._upstream
        with contextlib.suppress(ConnectionError):  # `_receive` closes then
            if isinstance(message, bytes):
                await self._upstream.send_bytes(message)
            else:
                await self._upstream.send_str(message)

    def on_close(self) -> None:
        super().on_close()
        if self._upstream:
            self._closing = asyncio.create_task(self._upstream.close(code=self.close_code or 1001))


def routes(base_url: str) -> list[tuple[str, type[web.RequestHandler]]]:
    """The same paths as the service's; the application's settings must hold `jupyter_agents_forwarder`."""
    return [
        (url_path_join(base_url, "jupyter-agents/events"), ForwardSocket),
        (url_path_join(base_url, "jupyter-agents/(.*)"), ForwardHandler),
    ]

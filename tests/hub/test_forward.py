"""The forwarder in front of a service that misbehaves in the ways that a real one rarely does."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import aiohttp
import pytest
from jupyter_server.auth import AllowAllAuthorizer, Authorizer, IdentityProvider
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketHandler

from jupyter_agents.hub import forward

TOKEN = {"Authorization": "token of-the-browser"}


class Echo(web.RequestHandler):
    async def prepare(self) -> None:
        self.write({"uri": self.request.uri, "headers": dict(self.request.headers), "body": self.request.body.decode()})

    def get(self, *args: str) -> None:
        self.set_header("Access-Control-Allow-Origin", "*")
        self.set_header("Set-Cookie", "stolen=1")
        self.set_header("Content-Disposition", "attachment")

    post = put = patch = delete = get  # type: ignore[assignment]


class Refuse(web.RequestHandler):
    def get(self) -> None:
        self.set_status(507)
        self.finish({"message": "full", "reason": "disk_full"})


@web.stream_request_body
class TooLarge(web.RequestHandler):
    def prepare(self) -> None:
        self.set_status(413)
        self.finish({"message": "too large", "reason": "too_large"})

    def data_received(self, chunk: bytes) -> None:
        pass


class Break(web.RequestHandler):
    async def get(self) -> None:
        self.write("the first half")
        await self.flush()
        self.detach().close()


class Endless(web.RequestHandler):
    written = 0
    closed = asyncio.Event()

    async def get(self) -> None:
        while True:
            self.write(b"x" * 65536)
            await self.flush()
            Endless.written += 65536

    def on_connection_close(self) -> None:
        self.closed.set()


class Socket(WebSocketHandler):
    close_codes: ClassVar[list[int | None]] = []

    def on_message(self, message: str | bytes) -> None:
        if message == "close":
            self.close(4321, "enough")
        elif message == "big":
            self.write_message("x" * 12 * 2**20)
        elif message == "die":
            self.stream.close()
        else:
            self.write_message(message, binary=isinstance(message, bytes))

    @property
    def stream(self) -> Any:
        return self.ws_connection.stream  # type: ignore[union-attr]

    def on_close(self) -> None:
        self.close_codes.append(self.close_code)


@asynccontextmanager
async def listening(app: web.Application) -> AsyncIterator[str]:
    (socket,) = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(app)
    server.add_sockets([socket])
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.stop()
        await server.close_all_connections()


@asynccontextmanager
async def a_server(url: str, authorizer: Authorizer | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A user's server that forwards to `url`, and a client of it, who has to give the token."""
    forwarder = forward.Forwarder(f"{url}/services/x/", "of-the-server")
    app = web.Application(
        forward.routes("/user/ann/"),
        base_url="/user/ann/",
        identity_provider=IdentityProvider(token="of-the-browser"),
        authorizer=authorizer or AllowAllAuthorizer(),
        jupyter_agents_forwarder=forwarder,
        cookie_secret="x",
    )
    async with listening(app) as address, aiohttp.ClientSession(f"{address}/user/ann/jupyter-agents/") as client:
        try:
            yield client
        finally:
            await forwarder.close()


def through(test: Callable[[aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Run `test` with a client of a server that forwards to the service above."""
    base = "/services/x/jupyter-agents/"
    service = web.Application(
        [
            (f"{base}refuse", Refuse),
            (f"{base}large", TooLarge),
            (f"{base}break", Break),
            (f"{base}endless", Endless),
            (f"{base}events", Socket),
            (f"{base}(.*)", Echo),
        ]
    )

    async def main() -> None:
        async with listening(service) as url, a_server(url) as client:
            await asyncio.wait_for(test(client), 30)

    asyncio.run(main())


def test_a_call_arrives_with_the_servers_token_and_without_the_browsers() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        for method in ("POST", "PUT", "PATCH"):
            async with client.request(
                method,
                "agents/a%2Fb/files/%C3%BC%20x?format=tar&token=of-the-browser&_xsrf=1&since=5",
                data=b"the body",
                headers={**TOKEN, "Cookie": "session=1", "X-XSRFToken": "1", "Content-Type": "text/x"},
            ) as response:
                told = json.loads(await response.text())
            assert told["uri"] == "/services/x/jupyter-agents/agents/a%2Fb/files/%C3%BC%20x?format=tar&since=5"
            assert told["body"] == "the body"
            headers = {name.lower(): value for name, value in told["headers"].items()}
            assert headers.pop("host")
            assert headers == {
                "authorization": "token of-the-server",
                "accept": "*/*",
                "content-type": "text/x",
                "content-length": "8",
            }
        async with client.get("agents", headers=TOKEN) as response:
            assert response.headers["Content-Disposition"] == "attachment"
            assert "stolen" not in str(response.headers)
            assert response.headers.get("Access-Control-Allow-Origin") != "*"
            assert "of-the-server" not in str(response.headers)

    through(test)


def test_who_may_not_is_stopped_before_the_service_hears_of_it() -> None:
    class Nobody(Authorizer):
        def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
            return False

    async def main() -> None:
        # The address leads nowhere: asking the service would give 503.
        for authorizer, headers in ((None, {}), (None, {"Authorization": "token wrong"}), (Nobody(), TOKEN)):
            async with a_server("http://127.0.0.1:9", authorizer) as client:
                for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
                    async with client.request(method, "agents", headers=headers, data=b"x") as response:
                        assert response.status == 403
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await client.ws_connect("events", headers=headers)

    asyncio.run(main())


def test_a_service_that_is_down_is_a_sentence() -> None:
    async def main() -> None:
        async with a_server("http://127.0.0.1:9") as client:
            async with client.get("workspace", headers=TOKEN) as response:
                assert response.status == 503
                assert (await response.json())["reason"] == "service_unavailable"
            async with client.put("agents/a/files/b", headers=TOKEN, data=io.BytesIO(b"x" * 2**22)) as response:
                assert response.status == 503
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await client.ws_connect("events", headers=TOKEN)

    asyncio.run(main())


def test_errors_arrive_as_they_were_sent() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        async with client.get("refuse", headers=TOKEN) as response:
            assert response.status == 507
            assert await response.json() == {"message": "full", "reason": "disk_full"}
        async with client.put("large", headers=TOKEN, data=io.BytesIO(b"x" * 2**22)) as response:
            assert response.status == 413

    through(test)


def test_half_an_answer_is_not_taken_for_a_whole_one() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        with pytest.raises(aiohttp.ClientPayloadError):
            async with client.get("break", headers=TOKEN) as response:
                await response.read()

    through(test)


def test_a_slow_reader_slows_the_service_down_and_a_gone_one_ends_it() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        async with client.get("endless", headers=TOKEN) as response:
            await response.content.read(1)
            await asyncio.sleep(1)
            assert Endless.written < 30 * 2**20  # what the sockets' buffers hold
            response.close()
        await asyncio.wait_for(Endless.closed.wait(), 5)

    Endless.closed = asyncio.Event()
    through(test)


def test_messages_and_close_codes_pass_both_ways() -> None:
    Socket.close_codes.clear()

    async def test(client: aiohttp.ClientSession) -> None:
        async with client.ws_connect("events", headers=TOKEN, max_msg_size=0) as ws:
            await ws.send_str("short")
            assert await ws.receive_str() == "short"
            await ws.send_str("big")
            assert len(await ws.receive_str()) == 12 * 2**20
            await ws.send_bytes(b"\0\xff")
            assert await ws.receive_bytes() == b"\0\xff"
            await ws.send_str("close")
            closed = await ws.receive()
            assert (closed.data, closed.extra) == (4321, "enough")
        async with client.ws_connect("events", headers=TOKEN) as ws:
            await ws.close(code=4444)
        async with client.ws_connect("events", headers=TOKEN) as ws:
            await ws.send_str("die")
            assert (await ws.receive()).data == 1012
        while len(Socket.close_codes) < 3:
            await asyncio.sleep(0.01)
        assert 4444 in Socket.close_codes

    through(test)


def test_another_origin_may_not_open_a_socket() -> None:
    async def test(client: aiohttp.ClientSession) -> None:
        async with client.get("workspace", params={"token": "of-the-browser"}) as response:
            cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in response.cookies.items())
        assert cookies
        client.cookie_jar.clear()
        same = str(client._base_url.origin())  # type: ignore[union-attr]
        async with client.ws_connect("events", headers={"Cookie": cookies, "Origin": same}):
            pass
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await client.ws_connect("events", headers={"Cookie": cookies, "Origin": "https://evil.example"})
        async with client.post("agents", headers={"Cookie": cookies}) as response:  # and no XSRF token
            assert response.status == 403

    through(test)

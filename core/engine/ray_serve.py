"""The engine on Ray Serve, where one machine is too small: replicas of core.engine.server behind one address.

`serve run deploy/ray/serve.yaml`; bots name that address as their ENGINE. What a session asks goes to one replica, by
consistent hashing of the header wire.SESSION, for there its keys and values are; another would say the same, later.
Only /forget is told to all: sessions move when replicas come and go.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from core import settings
from core.engine import wire
from core.engine.folder import PrivateFolder
from core.engine.process import local_options
from core.engine.server import Server, bound, open_local

ROUTER = {"request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"}
PASSED_ON = "content-type", "origin", wire.MODEL.lower(), wire.REQUEST.lower()
MOST_REQUESTS = 1000
"""Of a replica at a time; what is more goes to the next on the ring. The engine itself refuses sooner."""


class Replica:
    """Passes on what Ray Serve brings to a Server at a private socket, in this process."""

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """`options`: of core.engine.server.open_local. Raises what that raises."""
        context = serve.get_replica_context()
        self._name, self._app_name = context.deployment, context.app_name
        self._all = serve.get_deployment_handle(self._name, self._app_name)
        self._stack = AsyncExitStack()
        lent = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        options["threads"] = options["threads"] or lent  # others share the machine
        self._engine = await open_local(**options)
        self._stack.push_async_callback(self._engine.aclose)
        folder = PrivateFolder()
        self._stack.callback(folder.close)
        path = str(folder.path / "socket")
        server = Server(self._count).open(self._engine)
        await self._stack.enter_async_context(server.listening(self._stack.enter_context(bound(f"unix:{path}"))))
        connector, no_limit = aiohttp.UnixConnector(path, limit=0), aiohttp.ClientTimeout(total=None)
        self._http = aiohttp.ClientSession("http://engine", connector=connector, timeout=no_limit)
        await self._stack.enter_async_context(self._http)

    async def __call__(self, request: Request) -> Response:
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        asked = request.method, request.url.path, headers, await request.body()
        if request.url.path != "/forget":
            return await self.answer(*asked)
        answers: list[Response] = await self._all.broadcast("answer", *asked).results_async()
        return max(answers, key=lambda answer: answer.status_code)

    async def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Response:
        async with self._http.request(method, path, headers=headers, data=body) as answer:
            return Response(await answer.read(), answer.status, media_type=answer.content_type)

    async def _count(self) -> int:
        """Of replicas. The context's number is that of the start: `serve deploy` changes it without a word to us."""
        status = await asyncio.to_thread(serve.status)
        states = status.applications[self._app_name].deployments[self._name].replica_states
        return sum(count for state, count in states.items() if state != "STOPPING")

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if why := await self._engine.ready():
            raise RuntimeError(why)

    async def __del__(self) -> None:
        """Called by Ray Serve when nothing is under way any more."""
        await self._stack.aclose()


def app(_: dict[str, str]) -> Any:
    """The application, with the settings of its environment (MODEL, DTYPE, …). Raises WrongSettings."""
    (found,) = settings.read(settings.Settings)
    deployment = serve.deployment(name="engine", max_ongoing_requests=MOST_REQUESTS, request_router_config=ROUTER)
    return deployment(Replica).bind(local_options(found))

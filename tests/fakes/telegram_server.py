"""A Bot API server on loopback for one bot: chats, users who type, a ledger of every send, faults on request.

    async with TelegramServer() as server:
        server.private(7, "Ann")
        said = server.say(7, 7, "hi")            # an update; returns the message as the API shows it
        await server.until(1)                    # one accepted send
        assert server.ledger[0].text == "..."

By hand: `python -m tests.fakes.telegram_server --port 8081`. Over HTTP: POST /_fake/say, /_fake/faults, /_fake/chats
and GET /_fake/ledger, so that the bot and its test may be different processes.

What it does is from core.telegram.org/bots/api; the order of getUpdates and the wording of errors from the source of
github.com/tdlib/telegram-bot-api (Client.cpp, WebhookActor.cpp).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import defaultdict, deque
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import aiohttp
from aiohttp import web

TOKEN = "123456789:AAFakeTokenOfNobody-0123456789_abcd"
Json = dict[str, Any]
Kind = Literal[
    "conflict",
    "flood",
    "blocked",
    "migrated",
    "page",
    "delay",
    "reset_before",
    "reset_after",
    "garbage",
    "error",
]


@dataclass
class Fault:
    """What happens instead of, before or after a call. `times` -1 is for ever; `chat` None is every chat."""

    kind: Kind
    method: str = "sendMessage"
    chat: int | None = None
    times: int = 1
    value: Any = None
    """flood: the parameters, e.g. {"retry_after": 3}; delay: seconds; migrated: the new chat; error: [code, text];
    page: the HTTP status of some proxy's page, 502 when None; garbage: what is sent for an answer."""


@dataclass
class Sent:
    """One message that the server took and shows to people."""

    at: float
    chat: int
    thread: int | None
    text: str
    reply_to: int | None
    message_id: int
    params: Json = field(repr=False)


class Answer(Exception):
    """A call that failed, as the Bot API says it."""

    def __init__(self, code: int, description: str, parameters: Json | None = None) -> None:
        super().__init__(description)
        self.code, self.body = code, {"ok": False, "error_code": code, "description": description}
        if parameters is not None:
            self.body["parameters"] = parameters


class TelegramServer:
    def __init__(self, token: str = TOKEN, username: str = "palaver_bot", seed: int = 0, port: int = 0) -> None:
        self.token, self.port, self.rng = token, port, random.Random(seed)
        self.me = {
            "id": int(token.split(":")[0]),
            "is_bot": True,
            "first_name": "Palaver",
            "username": username,
            "can_join_groups": True,
            "can_read_all_group_messages": False,
            "supports_inline_queries": False,
        }
        self.chats: dict[int, Json] = {}
        self.users: dict[int, Json] = {}
        self.topics: dict[int, set[int]] = defaultdict(set)
        self.blocked: set[int] = set()
        self.messages: dict[tuple[int, int], Json] = {}
        self.ledger: list[Sent] = []
        self.typing: list[tuple[float, int, int | None]] = []
        self.calls: list[tuple[str, Json]] = []
        """Every call, refused ones too: (method, parameters)."""
        self.pending: list[Json] = []
        self._raw: dict[int, bytes] = {}
        self.faults: list[Fault] = []
        self.chaos: dict[Kind, float] = {}
        """Fault kind -> probability, for every sendMessage, drawn from the seed."""
        self.duplicates = self.reordered = 0.0
        """Probabilities that an update comes twice, and that it overtakes the one before it."""
        self.literal = False
        """Confirm whatever is below an offset, even what was numbered anew, lower, since."""
        self.webhook: Json = {"url": ""}
        self.delivered: list[tuple[int, int]] = []
        """(update id, HTTP status) of every delivery to the webhook."""
        self._next_update, self._next_message = 1000, 1
        self._changed = asyncio.Condition()
        self._poller: asyncio.Future[None] | None = None
        self._lines: dict[int, deque[Json]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.route("*", "/bot{token}/{method}", self._call),
                web.post("/_fake/say", self._http_say),
                web.post("/_fake/chats", self._http_chats),
                web.post("/_fake/faults", self._http_faults),
                web.get("/_fake/ledger", self._http_ledger),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._poller and not self._poller.done():
            self._poller.cancel()
        if self._runner:
            await self._runner.cleanup()

    @property
    def base(self) -> str:
        """TELEGRAM_API_BASE."""
        return f"http://127.0.0.1:{self.port}/bot"

    # -- people --------------------------------------------------------------------------------------------------

    def user(self, id: int, name: str = "", *, is_bot: bool = False) -> Json:
        return self.users.setdefault(id, {"id": id, "is_bot": is_bot, "first_name": name or f"User {id}"})

    def private(self, id: int, name: str = "") -> int:
        """A person's own chat with the bot; its id is the person's."""
        self.chats[id] = {"id": id, "type": "private", "first_name": self.user(id, name)["first_name"]}
        return id

    def group(self, id: int, *, topics: tuple[int, ...] = (), kind: str = "supergroup") -> int:
        self.chats[id] = {"id": id, "type": kind, "title": f"Group {id}"} | ({"is_forum": True} if topics else {})
        self.topics[id] |= set(topics)
        return id

    def say(
        self, chat: int, user: int, text: str, *, reply_to: int | None = None, topic: int | None = None, **more: Any
    ) -> Json:
        """A user types; `more` goes into the message as it is (caption=, entities=, date=). Returns the message."""
        message = self._message(chat, self.user(user), text, topic) | more
        if reply_to is not None:
            message["reply_to_message"] = self.messages[chat, reply_to]
        message = {name: value for name, value in message.items() if value is not None}
        self.messages[chat, message["message_id"]] = message
        self.update(message=message)
        return message

    def edit(self, chat: int, message_id: int, text: str) -> Json:
        message = self.messages[chat, message_id] | {"text": text, "edit_date": int(time.time())}
        message["entities"] = entities(text)
        self.messages[chat, message_id] = message
        self.update(edited_message=message)
        return message

    def migrate(self, old: int, new: int) -> None:
        """The group becomes a supergroup; both service messages are sent, and the old id answers 400 from now on."""
        self.chats[new] = self.chats[old] | {"id": new, "type": "supergroup"}
        owner = self.user(1, "Owner")
        self.update(message=self._message(old, owner, None) | {"migrate_to_chat_id": new})
        self.update(message=self._message(new, owner, None) | {"migrate_from_chat_id": old})
        self.faults.append(Fault("migrated", chat=old, times=-1, value=new))

    def update(self, **event: Any) -> int:
        """Queue any event, well formed or not; its update_id."""
        update = {"update_id": self._next_update, **event}
        self._next_update += 1
        for _ in range(2 if self.rng.random() < self.duplicates else 1):
            self.pending.append(update)
            if len(self.pending) > 1 and self.rng.random() < self.reordered:
                self.pending[-2:] = reversed(self.pending[-2:])
        self._wake()
        self._feed()
        return int(update["update_id"])

    def raw(self, template: bytes) -> int:
        """Queue bytes as they are, `%d` in them the update_id, for long polls; its update_id."""
        id = self.update()
        self._raw[id] = template % id
        return id

    def jump(self, to: int | None = None) -> None:
        """Update ids go on at random, as they do after a week without updates."""
        self._next_update = self.rng.randrange(1, 2**30) if to is None else to

    async def until(self, sends: int, timeout: float = 60.0) -> list[Sent]:
        """Wait for that many accepted sends in all; the ledger."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: len(self.ledger) >= sends)
        return self.ledger

    async def confirmed(self, timeout: float = 60.0) -> None:
        """Wait until every update is confirmed."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: not self.pending)

    def called(self, method: str) -> list[Json]:
        return [params for name, params in self.calls if name == method]

    # -- the Bot API ---------------------------------------------------------------------------------------------

    async def _call(self, request: web.Request) -> web.StreamResponse:
        method = request.match_info["method"]
        try:
            params = await _parameters(request)
        except ConnectionResetError:  # the bot was killed while it asked
            return web.Response()
        self.calls.append((method, params))
        after = False
        try:
            if request.match_info["token"] != self.token:
                raise Answer(401, "Unauthorized")
            for fault in self._due(method, _int(params.get("chat_id"))):
                if fault.kind == "reset_after":
                    after = True
                elif response := await self._fail(fault, request):
                    return response
            match method.lower():
                case "getme":
                    result: Any = self.me
                case "getupdates":
                    updates = [self._raw.get(u["update_id"]) or _bytes(u) for u in await self._get_updates(params)]
                    body = b'{"ok": true, "result": [' + b", ".join(updates) + b"]}"
                    return _reset(request) if after else web.Response(body=body, content_type="application/json")
                case "sendmessage":
                    result = self._send_message(params)
                case "sendchataction":
                    chat = self._known(params)
                    self.typing.append((time.monotonic(), chat, _int(params.get("message_thread_id"))))
                    result = True
                case "setwebhook":
                    result = self._set_webhook(params)
                case "deletewebhook":
                    if params.get("drop_pending_updates") in ("true", True):
                        self.pending.clear()
                    self.webhook, result = {"url": ""}, True
                case "getwebhookinfo":
                    result = {
                        "url": self.webhook["url"],
                        "has_custom_certificate": False,
                        "pending_update_count": len(self.pending),
                    }
                case "setmycommands":
                    result = True
                case "editmessagetext":
                    place = self._known(params), _int(params.get("message_id")) or 0
                    if place not in self.messages:
                        raise Answer(400, "Bad Request: message to edit not found")
                    self.messages[place]["text"] = params["text"]
                    result = self.messages[place]
                case "deletemessage":
                    if not self.messages.pop((self._known(params), _int(params.get("message_id")) or 0), None):
                        raise Answer(400, "Bad Request: message to delete not found")
                    result = True
                case _:
                    raise Answer(404, "Not Found: method not found")
        except Answer as answer:
            return web.json_response(answer.body, status=answer.code)
        if after:
            return _reset(request)
        return web.json_response({"ok": True, "result": result})

    def _due(self, method: str, chat: int | None) -> list[Fault]:
        due = []
        for fault in list(self.faults):
            if fault.method == method and fault.chat in (None, chat):
                due.append(fault)
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
                if fault.kind != "delay":
                    break  # one end to a call
        if method == "sendMessage":
            due += [Fault(kind) for kind, chance in self.chaos.items() if self.rng.random() < chance]
        return due

    async def _fail(self, fault: Fault, request: web.Request) -> web.StreamResponse | None:
        match fault.kind:
            case "delay":
                await asyncio.sleep(self.rng.random() * 0.05 if fault.value is None else fault.value)
                return None
            case "flood":
                parameters = {"retry_after": 1} if fault.value is None else fault.value
                raise Answer(429, "Too Many Requests: retry after 1", parameters)
            case "conflict":
                text = "terminated by other getUpdates request; make sure that only one bot instance is running"
                raise Answer(409, f"Conflict: {text}")
            case "blocked":
                raise Answer(403, "Forbidden: bot was blocked by the user")
            case "migrated":
                text = "Bad Request: group chat was upgraded to a supergroup chat"
                raise Answer(400, text, {"migrate_to_chat_id": fault.value})
            case "error":
                raise Answer(*fault.value)
            case "page":
                html = "<html><h1>Not from Telegram</h1></html>"
                return web.Response(status=fault.value or 502, text=html, content_type="text/html")
            case "garbage":
                return web.Response(text=fault.value or '{"ok": tr')
        return _reset(request)

    async def _get_updates(self, params: Json) -> list[Any]:
        """Long poll. A new poll ends the older one with 409; a reasonable offset confirms all ids below it."""
        if self.webhook["url"]:
            text = "can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook first"
            raise Answer(409, f"Conflict: {text}")
        if self._poller and not self._poller.done():
            self._poller.set_exception(
                Answer(
                    409,
                    "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
                )
            )
        mine = self._poller = asyncio.get_running_loop().create_future()
        offset, limit = _int(params.get("offset")) or 0, _int(params.get("limit")) or 100
        if offset < 0:
            del self.pending[:offset]
        elif offset > 0 and (self.literal or offset <= self._next_update + 10):  # from the future: as if none
            self.pending = [update for update in self.pending if update["update_id"] >= offset]
            self._wake()
        end = time.monotonic() + min(_int(params.get("timeout")) or 0, 50)
        try:
            while not self.pending and (left := end - time.monotonic()) > 0:
                waiting = asyncio.create_task(self._news())
                await asyncio.wait({waiting, mine}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if mine.done():
                    mine.result()
            return self.pending[: min(limit, 100)]
        finally:
            if not mine.done():
                mine.set_result(None)

    def _send_message(self, params: Json) -> Json:
        chat, text = self._known(params), params.get("text", "")
        thread = _int(params.get("message_thread_id"))
        if not str(text).strip():
            raise Answer(400, "Bad Request: message text is empty")
        if len(text.encode("utf-16-le", "surrogatepass")) // 2 > 4096:
            raise Answer(400, "Bad Request: message is too long")
        if "parse_mode" in params:
            raise Answer(400, "Bad Request: can't parse entities: this server takes plain text")
        if thread is not None and thread not in self.topics[chat]:
            raise Answer(400, "Bad Request: message thread not found")
        reply = params.get("reply_parameters") or {}
        reply = json.loads(reply) if isinstance(reply, str) else reply
        target = _int(reply.get("message_id"))
        if target is not None and (chat, target) not in self.messages:
            if not reply.get("allow_sending_without_reply"):
                raise Answer(400, "Bad Request: message to be replied not found")
            target = None
        message = self._message(chat, self.me, text, thread)
        if target is not None:
            message["reply_to_message"] = self.messages[chat, target]
        self.messages[chat, message["message_id"]] = message
        self.ledger.append(Sent(time.monotonic(), chat, thread, text, target, message["message_id"], params))
        self._wake()
        return message

    def _known(self, params: Json) -> int:
        chat = _int(params.get("chat_id"))
        if chat is None or chat not in self.chats:
            raise Answer(400, "Bad Request: chat not found")
        if chat in self.blocked:
            raise Answer(403, "Forbidden: bot was blocked by the user")
        return chat

    def _message(self, chat: int, author: Json, text: str | None, topic: int | None = None) -> Json:
        message = {
            "message_id": self._next_message,
            "from": author,
            "chat": self.chats[chat],
            "date": int(time.time()),
        }
        self._next_message += 1
        if text is not None:
            message |= {"text": text, "entities": entities(text)}
        if topic is not None:
            message |= {"message_thread_id": topic, "is_topic_message": True}
        return message

    # -- webhook -------------------------------------------------------------------------------------------------

    def _set_webhook(self, params: Json) -> bool:
        if not str(params.get("url", "")).startswith(("https://", "http://127.0.0.1")):
            raise Answer(400, "Bad Request: bad webhook: An HTTPS URL must be provided for webhook")
        if params.get("drop_pending_updates") in ("true", True):
            self.pending.clear()
        self.webhook = params
        self._feed()
        return True

    def _feed(self) -> None:
        """Pending updates into the webhook's lines, one for each chat."""
        if not self.webhook["url"]:
            return
        for update in self.pending:
            event = next((value for name, value in update.items() if name != "update_id"), None)
            where = event.get("chat") if isinstance(event, dict) else None
            chat = where.get("id", 0) if isinstance(where, dict) else 0
            if chat not in self._lines:
                self._lines[chat] = deque()
                self._start(self._deliver(chat))
            if all(update is not other for other in self._lines[chat]):
                self._lines[chat].append(update)

    async def _deliver(self, chat: int) -> None:
        """One chat's line, front to back, one in flight; the task ends with the line."""
        line = self._lines[chat]
        headers = {"X-Telegram-Bot-Api-Secret-Token": self.webhook.get("secret_token", "")}
        async with aiohttp.ClientSession() as session:
            while line and self.webhook["url"]:
                wait = 0.2
                try:
                    async with session.post(self.webhook["url"], json=line[0], headers=headers) as response:
                        self.delivered.append((line[0]["update_id"], response.status))
                        if 200 <= response.status < 300:
                            self.pending = [update for update in self.pending if update is not line[0]]
                            line.popleft()
                            self._wake()
                            continue
                        wait = float(response.headers.get("Retry-After", wait))
                except aiohttp.ClientError:
                    self.delivered.append((line[0]["update_id"], 0))
                await asyncio.sleep(wait)
        del self._lines[chat]

    # -- control over HTTP ---------------------------------------------------------------------------------------

    async def _http_say(self, request: web.Request) -> web.Response:
        return web.json_response([self.say(**said) for said in await request.json()])

    async def _http_chats(self, request: web.Request) -> web.Response:
        for chat in await request.json():
            if chat["id"] > 0:
                self.private(**chat)
            else:
                self.group(**(chat | {"topics": tuple(chat.get("topics", ()))}))
        return web.json_response(True)

    async def _http_faults(self, request: web.Request) -> web.Response:
        self.faults += [Fault(**fault) for fault in await request.json()]
        return web.json_response(True)

    async def _http_ledger(self, request: web.Request) -> web.Response:
        """The sends so far; ?sends=N waits for that many, at most ?timeout=S."""
        with contextlib.suppress(TimeoutError):  # the ledger shows what is missing
            await self.until(int(request.query.get("sends", 0)), float(request.query.get("timeout", 30)))
        return web.json_response({"sent": [asdict(sent) for sent in self.ledger], "pending": len(self.pending)})

    async def _news(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self.pending))

    def _wake(self) -> None:
        async def wake() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._start(wake())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def entities(text: str) -> list[Json]:
    """What Telegram marks in a text: a command at its start, @mentions. Offsets in UTF-16 units."""

    def mark(kind: str, match: re.Match[str]) -> Json:
        units = [len(text[:end].encode("utf-16-le", "surrogatepass")) // 2 for end in match.span()]
        return {"type": kind, "offset": units[0], "length": units[1] - units[0]}

    commands = [mark("bot_command", m) for m in re.finditer(r"^/\w+(@\w+)?", text)]
    return commands + [mark("mention", m) for m in re.finditer(r"(?<![\w/])@\w{3,}", text)]


async def _parameters(request: web.Request) -> Json:
    """Query, JSON and form, as the Bot API takes them."""
    params: Json = dict(request.query)
    if request.content_type == "application/json":
        params |= await request.json()
    elif request.can_read_body:
        params |= dict(await request.post())
    return params


def _bytes(value: Json) -> bytes:
    return json.dumps(value).encode()


def _int(value: Any) -> int | None:
    return None if value in (None, "") else int(value)


def _reset(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _by_hand(port: int) -> None:
    """A prompt: what is typed is said; `:dm NAME`, `:group NAME`, `:topic N` change who says it and where."""
    names = {"ann": 11, "bob": 12}
    async with TelegramServer(port=port) as server:
        print(f"TELEGRAM_TOKEN={server.token}\nTELEGRAM_API_BASE={server.base}\n")
        print(":dm NAME | :group NAME | :topic NAME write as that person; :reply ID TEXT; :edit ID TEXT; :quit")
        group, forum = server.group(-1001), server.group(-1002, topics=(5,))
        who, where, topic = 11, server.private(11, "ann"), None

        async def show() -> None:
            shown = 0
            while True:
                await server.until(shown + 1, timeout=10**9)
                for sent in server.ledger[shown:]:
                    place = f"{sent.chat}" + (f"/{sent.thread}" if sent.thread else "")
                    print(f"\n[{place}] bot, to {sent.reply_to}: {sent.text}")
                shown = len(server.ledger)

        showing = asyncio.create_task(show())
        while True:
            try:
                line = await asyncio.to_thread(input, f"{server.users[who]['first_name']} in {where}> ")
            except EOFError:
                break
            command, _, rest = line.partition(" ")
            if command == ":quit":
                break
            if command in (":dm", ":group", ":topic"):
                name = rest.strip().lower() or "ann"
                who = names.setdefault(name, 11 + len(names))
                server.user(who, name)
                where = {":dm": who, ":group": group, ":topic": forum}[command]
                topic = 5 if command == ":topic" else None
                if command == ":dm":
                    server.private(who, name)
            elif command in (":reply", ":edit"):
                id, _, text = rest.partition(" ")
                try:
                    said = (
                        server.edit(where, int(id), text)
                        if command == ":edit"
                        else server.say(where, who, text, reply_to=int(id), topic=topic)
                    )
                    print(f"  message {said['message_id']}")
                except (KeyError, ValueError):
                    print("  no such message here")
            elif line.strip():
                print(f"  message {server.say(where, who, line, topic=topic)['message_id']}")
        showing.cancel()


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="A Telegram of your own, to try the bot against.")
    parser.add_argument("--port", type=int, default=8081)
    asyncio.run(_by_hand(parser.parse_args().port))

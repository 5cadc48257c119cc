"""Every counter, gauge and histogram, named in one place. Labels are platforms and states, never texts or people.

Prometheus' naming (base units, `_total` for counters). Served at /metrics on the web port.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)

received = Counter("palaver_messages_received", "Questions stored, each once.", ["platform"])
refused = Counter("palaver_messages_refused", "Times that the journal could not take what came: it comes again.")
finished = Counter(
    "palaver_messages_finished", "Questions that reached a final state in this process.", ["platform", "state"]
)
waiting = Gauge("palaver_requests_waiting", "Requests in the queue.")
under_way = Gauge("palaver_requests_under_way", "Answers being made.")
answer_seconds = Histogram("palaver_answer_seconds", "From receipt to the reply in the journal.", buckets=_SECONDS)
generate_seconds = Histogram("palaver_generate_seconds", "One call of the engine.", buckets=_SECONDS)
commit_seconds = Histogram("palaver_receive_commit_seconds", "Until a message was on disk.", buckets=_SECONDS)
tokens = Counter("palaver_tokens", "Tokens of prompts and replies.", ["kind"])
sends = Counter("palaver_sends", "Attempts to deliver a reply, by how they ended.", ["platform", "outcome"])
undelivered = Gauge("palaver_replies_undelivered", "Replies waiting to be sent.")
engine_failures = Counter("palaver_engine_failures", "Requests the engine refused or lost.", ["reason"])
engine_restarts = Counter("palaver_engine_restarts", "Engine processes that had to be started again.")
bot_restarts = Counter("palaver_bot_restarts", "Bots that died and were started again.", ["platform"])
bot_up = Gauge("palaver_bot_up", "1 while the bot serves.", ["platform"])
loop_lag_seconds = Histogram(
    "palaver_loop_lag_seconds", "How late the event loop woke.", buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
)


def exposition() -> bytes:
    """The text format of Prometheus."""
    return generate_latest()

"""Tell systemd how we are (sd_notify(3)): one datagram to the socket it names; nothing anywhere else.

By hand and not by a library: it is a dozen lines, and the wheels that do it are bindings of libsystemd.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """`state` is READY=1, STOPPING=1, WATCHDOG=1 or EXTEND_TIMEOUT_USEC=…, or lines of these; never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), address)

"""Limits on connections, in front of uvicorn's parsers: their bytes, their time and their number.

    uvicorn.Config(app, **http_settings())

- A client has a time for the request line and headers (the head), for a body, and to take its answer.
- The head has a limit in bytes. What exceeds a limit is answered with one JSON sentence, and the connection ends.
- The number of connections stays below the number of file descriptors. At the limit, a new connection replaces the one
  that has waited longest without a complete request.

All limits apply before the application sees a request, so before any token is checked. A request that arrives in one
packet sets no timer.

Not covered: limits for one address. Those belong to the proxy in front.
"""

import asyncio
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVE = 64  # file descriptors for everything but connections: bundles, logs, the loop
MOST = 2_000  # connections, each with up to 64 KB and MAX_HEADERS headers that wait for more
MAX_HEADERS = 100
LINGER = 1.0  # seconds for a refused client to read the reason,
LINGER_BYTES = 1024 * 1024  # unless it sends this much more


def file_budget() -> int:
    """How many file descriptors connections may take, those that wait to be accepted included."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return 2 * MOST
    return max(files - RESERVE, 16)


def most_connections() -> int:
    return min(MOST, file_budget() * 3 // 4)


@dataclass(frozen=True)
class Limits:
    """What one connection may use, and the number of connections."""

    head_bytes: int = 64 * 1024
    head_seconds: float = 10  # from the connection or the head's first byte
    body_seconds: float = 30  # from the end of the head
    answer_seconds: float = 60  # for the client to take what does not fit into the socket
    connections: int = field(default_factory=most_connections)


class HeadWithBody:
    """A transport as a request's cycle sees it: the head goes out with the first part of the body.

    uvicorn writes them one after the other, and each write is a packet, for which the client wakes up. One packet takes
    10 % less processor time per request (server and models together, at 32 clients).
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # until it is written, and empty from then on

    def write(self, data: bytes) -> None:
        if self._head is None:
            self._head = data
            return
        self._transport.write(self._head + data)
        self._head = b""

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._transport.close()


class Limited(asyncio.Protocol):
    """A mixin for one of uvicorn's protocols, which it limits. It comes first in the list of base classes."""

    limits = Limits()

    # uvicorn's attributes
    cycle: Any  # the latest request and its answer, None before the first
    connections: set[Any]
    flow: Any
    headers: Any  # those of the latest head, as far as it has been read
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._head = 0  # bytes of a head that has not ended
        self._is_in_body = False
        self._is_refused = False
        self._dropped = 0  # bytes after a refusal
        self._timer: asyncio.TimerHandle | None = None
        self.since = self.loop.time()  # when it was opened, or sent its latest request

    @property
    def is_working(self) -> bool:
        """Whether a complete request waits for its answer."""
        cycle = self.cycle
        return cycle is not None and not (cycle.response_complete or self._has_more_body())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._make_room()
        if not self._is_refused:
            self._after(self.limits.head_seconds, self._end_late_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self._is_refused and not self.transport.is_closing():
            room = self.limits.head_bytes - self._head
            self._feed(data[:room])
            data = data[room:]
        if self._is_refused:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.transport.abort()

    def _feed(self, piece: bytes) -> None:
        """Gives the parser a piece that is too short for a head to exceed its limit."""
        before = self.cycle
        super().data_received(piece)
        if self._is_refused:
            return
        if self.cycle is not before:
            self._start_request()
        elif not self._is_in_body:
            self._count_head(len(piece))
        elif not self._has_more_body():
            self._is_in_body = False
            self._cancel_timer()

    def _start_request(self) -> None:
        self.since = self.loop.time()
        has_body = self.cycle.scope["method"] != "HEAD"
        if has_body and not self.cycle.waiting_for_100_continue:
            self.cycle.transport = HeadWithBody(self.transport)
        self._head = 0
        self._is_in_body = self._has_more_body()
        if self._is_in_body:
            self._after(self.limits.body_seconds, self._end_late_body)
        else:
            self._cancel_timer()

    def _count_head(self, size: int) -> None:
        self._head += size
        if self._head >= self.limits.head_bytes:
            self.refuse(
                431,
                f"the address and headers are too long: at most {self.limits.head_bytes:,} bytes",
            )
        elif len(self.headers or ()) > MAX_HEADERS:
            self.refuse(431, f"too many headers: at most {MAX_HEADERS}")
        elif self._timer is None:
            self._after(self.limits.head_seconds, self._end_late_head)

    def _has_more_body(self) -> bool:
        return bool(self.cycle.more_body)

    # --------------------------------------------------------------------------------------------------------
    # Ends

    def refuse(self, status: int, sentence: str) -> None:
        """Answers in place of the application, if there is no answer yet, and ends the connection."""
        self._is_refused = True
        if self.is_working:
            self.cycle.keep_alive = False  # the earlier request is answered first
            self._cancel_timer()
            return
        is_in_body = self.cycle is not None and self._has_more_body()
        if not (is_in_body and self.cycle.response_started):
            self.transport.write(_response(status, sentence))
        if is_in_body:
            self.cycle.disconnected = True  # for the application, which still waits for the body
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()  # and the rest is read: a reset could overtake the answer
        self._after(LINGER, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what its parser does not understand, in the API's form."""
        status = getattr(sys.exception(), "error_status_hint", 400)  # h11 gives one
        self.refuse(status, "this is not a valid HTTP request")

    def _unsupported_upgrade_warning(self) -> None:
        """No line in the log: a client may ask for another protocol, and gets its answer in this one."""

    def _end_late_head(self) -> None:
        if self._head:
            seconds = self.limits.head_seconds
            self.refuse(408, f"the headers did not arrive within {seconds:g} seconds")
        else:
            self.transport.close()

    def _end_late_body(self) -> None:
        seconds = self.limits.body_seconds
        self.refuse(408, f"the body did not arrive within {seconds:g} seconds")

    def _make_room(self) -> None:
        waiting = [each for each in self.connections if each is not self and not each.is_working]
        if not waiting:
            return self.refuse(503, "the server has too many connections: try again in a second")
        oldest = min(waiting, key=lambda each: each.since)
        self.connections.discard(oldest)
        oldest.transport.abort()

    # --------------------------------------------------------------------------------------------------------
    # Clients that do not take their answer

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after(self.limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if self.transport.is_closing():
            self._abort_if_stuck()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # type: ignore[misc]
        self._abort_if_stuck()

    def _abort_if_stuck(self) -> None:
        """A closed transport waits forever for its client to take the rest."""
        if self.transport.get_write_buffer_size():
            self._after(self.limits.answer_seconds, self.transport.abort)

    # --------------------------------------------------------------------------------------------------------
    # One timer: what it waits for changes

    def _after(self, seconds: float, end: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(seconds, end)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class LimitedH11(Limited, H11Protocol):
    """For h11."""

    def _has_more_body(self) -> bool:
        # uvicorn keeps `more_body` if the answer comes before the body's end.
        state = self.conn.their_state.__name__
        return self.cycle.more_body and state in ("SEND_BODY", "ERROR")


if AutoHTTPProtocol is H11Protocol:  # without httptools
    Protocol: type[Limited] = LimitedH11
else:

    class LimitedHttpTools(Limited, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.cycle.more_body = (
                False  # uvicorn keeps it if the answer comes before the body's end
            )

    Protocol = LimitedHttpTools


def http_settings() -> dict[str, Any]:
    """uvicorn's settings of a server with these limits."""
    budget = file_budget()
    return {
        "http": Protocol,
        "ws": "none",
        "backlog": min(2048, budget - budget * 3 // 4),
        "h11_max_incomplete_event_size": 2 * Limits.head_bytes,  # counted here
    }


def _response(status: int, sentence: str) -> bytes:
    body = json.dumps({"detail": sentence}).encode()
    lines = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

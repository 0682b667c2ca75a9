"""Answers about a job on their way to the caller in pieces: a large result, and a stream of statuses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from time import monotonic

from abhiapi import encodings, jsonbytes, queuewire, settlement, wire
from abhiapi.admission import Outcome
from abhiapi.errors import BodyIncomplete, UpstreamBroken
from abhiapi.fal import FalReply
from abhiapi.jobs import Job
from abhiapi.runtime import Runtime
from abhiapi.settings import SLOW_CALLER_S

EVENT_BYTES_MAX = 16 * 1024 * 1024  # one line of a status stream


def rewritten(rt: Runtime, document: bytes, base_url: str, model: str, request_id: str) -> bytes:
    """A queue answer whose URLs lead here."""
    return queuewire.rewritten(
        document, fal_url=rt.settings.fal_queue_url, base_url=base_url, model=model, request_id=request_id
    )


class _Pieces:
    """What both kinds have in common: fal's answer is closed with them, and whoever waits for that is told once."""

    def __init__(self, reply: FalReply) -> None:
        self._reply = reply
        self._pieces = self._iterate()
        self.when_closed: Callable[[], object] = lambda: None

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()
        self._reply.close()
        when_closed, self.when_closed = self.when_closed, lambda: None
        when_closed()

    def _iterate(self) -> Generator[bytes]:
        raise NotImplementedError


class ResultBody(_Pieces):
    """A job's answer on its way to the caller, with its charge before the last brace. Nothing is left to settle."""

    def __init__(self, reply: FalReply, member: bytes) -> None:
        super().__init__(reply)
        self._member = member
        is_json = wire.is_json_type(reply.value("content-type"))
        encoding = (reply.value("content-encoding") or "identity").strip().lower()
        is_decoded = is_json and encoding in encodings.DECODABLE
        self.is_json = is_json and (is_decoded or encoding == "identity")
        self._read1 = encodings.DecodingReader(reply.read1) if is_decoded else reply.read1
        dropped = "content-encoding" if is_decoded else ""
        self.headers = [(name, value) for name, value in reply.headers if name.lower() != dropped]
        self._read: list[bytes] = []
        self._ended = False

    def read_whole(self, most: int) -> bytes | None:
        """The whole body if it is short JSON or an error; else None, and what was read is kept for later."""
        if not self.is_json and self._reply.status < 400:
            return None
        size = 0
        while size <= most:
            piece = self._read1()
            if not piece:
                self._ended = True
                return b"".join(self._read)
            self._read.append(piece)
            size += len(piece)
        return None

    def _iterate(self) -> Generator[bytes]:
        splicer = jsonbytes.Splicer() if self.is_json else None
        give_up = monotonic() + SLOW_CALLER_S
        while piece := (self._read.pop(0) if self._read else b"" if self._ended else self._read1()):
            ready = splicer.feed(piece) if splicer else piece
            if ready:
                yield ready
            if monotonic() > give_up:
                raise BodyIncomplete("the answer was read too slowly: it can be fetched again")
        if splicer:
            yield splicer.end(self._member)


class StatusEvents(_Pieces):
    """fal's status stream on its way to the caller, line by line.

    A caller who goes away ends the stream at fal too: a status costs nothing.
    """

    def __init__(self, rt: Runtime, job: Job, reply: FalReply, base_url: str) -> None:
        super().__init__(reply)
        self._rt, self._job, self._base_url = rt, job, base_url
        self._outcome: Outcome | None = None

    def _iterate(self) -> Generator[bytes]:
        rest, last = b"", b"\n"
        yield b""  # the head leaves now: fal may have nothing to say about the job for long
        while piece := self._reply.read1():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > EVENT_BYTES_MAX:
                raise UpstreamBroken("a line of fal's status stream has no end")
            if lines:
                yield b"".join(self._line(line) + b"\n" for line in lines)
        if rest:
            last = self._line(rest)
            yield last
        outcome = self._outcome or settlement.known(self._rt, self._job)
        member = wire.billing_member(self._job.call.model, outcome.charge_micros, outcome.balance_micros)
        yield (b"" if last.endswith(b"\n") else b"\n") + wire.billing_comment(member)

    def _line(self, line: bytes) -> bytes:
        """One line as it may leave: a status with our URLs, and settled if it shows the end."""
        name, colon, value = line.partition(b":")
        if name != b"data" or not colon:
            return line
        if queuewire.status_of(value) == "COMPLETED":
            self._outcome = settlement.settle(self._rt, self._job)
        changed = rewritten(self._rt, value, self._base_url, self._job.call.model, self._job.request_id)
        return name + colon + changed

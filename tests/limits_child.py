"""A process that counts limits with others over one Redis, for tests: told what to do line by line on stdin.
Run under `gevent.monkey`, as a server is. Waits longer for Redis than one, since tests make machines busy.

enter KEY N     that many calls at once: how many were admitted, refused for places, refused for the minute
leave KEY N     so many of the admitted ones end, or all that there are
make KEY N      that many calls, one after the other, each ended before the next
state           whether Redis is in use, how many decisions were made without it, and how many calls fal works on
"""

import json
import sys
from collections import Counter

import gevent
from gevent.fileobject import FileObject

from abhiapi.errors import AbhiError
from abhiapi.fairness import Turn
from abhiapi.gate import Gate
from abhiapi.limits import CallLimits, Lease
from abhiapi.settings import Settings


def main(url: str, lease_s: str, renew_s: str, environ: str) -> None:
    alone: list[int] = []
    settings = Settings.from_env({"ABHIAPI_LIMITS_URL": url} | json.loads(environ))
    limits = CallLimits(
        settings, on_fallback=lambda: alone.append(1), lease_s=float(lease_s), renew_s=float(renew_s), timeout_s=5
    )
    gate = Gate(settings.fal_concurrency, settings.fal_queue_s, shared=limits.shared)
    turns: list[Turn | None] = []
    leases: dict[int, list[Lease]] = {}

    def enter(key_id: int) -> str:
        try:
            lease = limits.enter(key_id, "free")
        except AbhiError as error:
            return error.type
        leases.setdefault(key_id, []).append(lease)
        return "admitted"

    def leave(key_id: int) -> int:
        if not leases.get(key_id):
            return 0
        leases[key_id].pop().release()
        return 1

    def take_turn() -> None:
        turns.append(gate.enter(1, has_hung_up=lambda: False, before_waiting=lambda: None))

    for line in FileObject(sys.stdin.buffer, "rb"):
        command, *words = line.decode().split()
        if command == "enter":
            greenlets = gevent.joinall([gevent.spawn(enter, int(words[0])) for _ in range(int(words[1]))])
            answer: object = Counter(greenlet.value for greenlet in greenlets)
        elif command == "leave":
            answer = {"ended": sum(leave(int(words[0])) for _ in range(int(words[1])))}
        elif command == "make":
            outcomes = []
            for _ in range(int(words[1])):
                outcomes.append(enter(int(words[0])))
                if outcomes[-1] == "admitted":
                    leave(int(words[0]))
            answer = Counter(outcomes)
        elif command == "turns":
            answer = len([gevent.spawn(take_turn) for _ in range(int(words[0]))])
        elif command == "over":
            ending = [turns.pop(0) for _ in range(min(len(turns), int(words[0])))]
            for turn in ending:
                gate.end(turn)
            answer = len(ending)
        else:
            answer = {"shared": limits.is_shared(), "alone": len(alone), "running": len(turns)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

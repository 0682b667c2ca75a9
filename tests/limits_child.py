"""A process that counts limits with others over one Redis, for tests: told what to do line by line on stdin.
Run under `gevent.monkey`, as a server is. Waits longer for Redis than one, since tests make machines busy.

enter KEY N     that many calls at once: how many were admitted, refused for places, refused for the minute
leave KEY N     so many of the admitted ones end, or all that there are
make KEY N      that many calls, one after the other, each ended before the next
turns N ACCOUNT that many calls come to the gate before fal: answered when they are there, not when they have begun
over N ACCOUNT  so many of those that fal works on end, or all that there are
state           whether Redis is in use, how many decisions were made without it, how many calls of each account fal
                works on, and how many wait for their turn
"""

import json
import sys
from collections import Counter

import gevent
from gevent.fileobject import FileObject

from abhiapi.errors import AbhiError, UpstreamBusy
from abhiapi.fairness import Turn
from abhiapi.gate import Gate
from abhiapi.limits import CallLimits, Lease
from abhiapi.settings import Settings
from abhiapi.shared_turns import SharedTurns


def main(url: str, lease_s: str, renew_s: str, environ: str) -> None:
    alone: list[int] = []
    settings = Settings.from_env({"ABHIAPI_LIMITS_URL": url} | json.loads(environ))
    limits = CallLimits(
        settings, on_fallback=lambda: alone.append(1), lease_s=float(lease_s), renew_s=float(renew_s), timeout_s=5
    )
    assert limits.shared is not None
    gate = Gate(
        settings.fal_concurrency, settings.fal_queue_s, shared=SharedTurns(limits.shared, waits_s=float(lease_s))
    )
    running: dict[str, list[Turn | None]] = {}
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

    def take_turn(account: str) -> None:
        try:
            turn = gate.enter(int(account), has_hung_up=lambda: False, before_waiting=lambda: None)
        except UpstreamBusy:
            return
        running.setdefault(account, []).append(turn)

    def end_turns(number: int, account: str) -> int:
        turns = running.get(account, [])
        ending, turns[:] = turns[:number], turns[number:]
        for turn in ending:
            gate.end(turn)
        return len(ending)

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
            answer = len([gevent.spawn(take_turn, words[1]) for _ in range(int(words[0]))])
            gevent.sleep(0)
        elif command == "over":
            answer = end_turns(int(words[0]), words[1])
        else:
            counts = {account: len(turns) for account, turns in running.items()}
            answer = {
                "shared": limits.is_shared(),
                "alone": len(alone),
                "running": counts,
                "waiting": gate.waiting(),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How many bytes this process keeps of an account's in a day: decided by plain numbers, without a clock.

A brake on who would fill the disk, far above what anybody needs. So it may be forgotten with the process, and each
process counts for itself.
"""

from __future__ import annotations

from abhiapi.days import MS_PER_DAY

ACCOUNT_BYTES_MAX = 1024 * 1024 * 1024
SMALL_BYTES = 4 * 1024  # no more than a call's own row: always kept, and not counted


class DailyBytes:
    """What has been taken of each account's allowance today (UTC)."""

    def __init__(self, most: int = ACCOUNT_BYTES_MAX) -> None:
        self.most = most
        self._day = 0
        self._taken: dict[int, int] = {}
        self._refused: set[int] = set()

    def take(self, account_id: int, size_bytes: int, *, now_ms: int) -> bool:
        """Whether so many bytes may be kept; then they are counted."""
        if size_bytes <= SMALL_BYTES:
            return True
        if now_ms // MS_PER_DAY != self._day:
            self._day = now_ms // MS_PER_DAY
            self._taken.clear()
            self._refused.clear()
        taken = self._taken.get(account_id, 0) + size_bytes
        if taken > self.most:
            return False
        self._taken[account_id] = taken
        return True

    def is_news(self, account_id: int) -> bool:
        """Whether this is the first time today that an account's bytes are refused: one line of the log will do."""
        is_first = account_id not in self._refused
        self._refused.add(account_id)
        return is_first

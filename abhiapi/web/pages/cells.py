"""How long something took or has stood, and how a webhook's delivery goes, as tables show them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from abhiapi.webhooks import WebhookRow


@dataclass(frozen=True, slots=True)
class WebhookCells:
    """A delivery as its customer sees it: of the address the host only, since the rest may hold secrets."""

    call_id: int
    host: str
    state: str
    attempts: int
    answer: str
    next_attempt_at: int | None
    created_at: int
    ended_at: int | None
    can_resend: bool


def webhook_cells(row: WebhookRow) -> WebhookCells:
    return WebhookCells(
        row.call_id,
        host_of(row.url),
        row.state,
        row.attempts if row.state != "waiting" else 0,  # while waiting it counts attempts to make the payload
        _answer(row),
        row.next_attempt_at if row.state == "due" else None,
        row.created_at,
        row.ended_at,
        row.state != "waiting" and bool(row.has_payload),
    )


def host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or "?"
    except ValueError:
        return "?"


def age(milliseconds: int) -> str:
    """Time in its two largest units: ``3 d 4 h``, ``5 min 2 s``, ``0 s``."""
    seconds = max(0, milliseconds) // 1000
    parts = [(seconds // 86_400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((number for number, (amount, _) in enumerate(parts) if amount), 3)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2] if amount) or "0 s"


def took(milliseconds: int) -> str:
    """Seconds to the millisecond: ``1.204 s``."""
    return f"{milliseconds // 1000}.{milliseconds % 1000:03} s"


def _answer(row: WebhookRow) -> str:
    if row.last_status is not None:
        return f"status {row.last_status}"
    return "no answer" if row.last_error else "none yet"

"""How each kind of setting is written: a text becomes a value, or is refused with what it must be.

Raises ValueError, whose message follows the setting's name and shows nothing that is secret.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from decimal import Decimal
from urllib.parse import urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from abhiapi.errors import BadAmount
from abhiapi.money import Micros, parse_amount


def text(value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise ValueError("must be plain printable ASCII")
    return value


def credential(value: str) -> str | None:
    value = value.strip()
    if not value:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must be printable ASCII without spaces (the value is not shown here)")
    return value


def whole(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return parse


def one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in words:
            raise ValueError(f"must be one of: {', '.join(words)}")
        return value

    return parse


def flag(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return value == "1"


def webhook_key(value: str) -> bytes | None:
    return webhook_secret(value) if value else None


def webhook_secret(text: str) -> bytes:
    """32 bytes in base64. Raises ValueError, which does not show them."""
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise ValueError("must be 32 random bytes in base64, as `openssl rand -base64 32` prints")
    return secret


def secret_key(value: str) -> str | None:
    secret = credential(value)
    if secret is not None and len(secret) < 32:
        raise ValueError("must have at least 32 characters (the value is not shown here)")
    return secret


def interval(value: str) -> int:
    return 0 if value == "0" else whole(60, 30 * 86_400)(value)


def margin(value: str) -> Decimal:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", value):
        raise ValueError("must be a plain decimal such as 0.05 (for 5 percent)")
    return Decimal(value)


def credits(value: str) -> Micros:
    try:
        return parse_amount(value)
    except BadAmount as error:
        raise ValueError("must be a number of credits above 0 such as 100") from error


def base_url(value: str) -> str:
    parts = urlsplit(value)
    plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    if not plain or "@" in parts.netloc or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must be a URL such as https://fal.run")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError("has a port that is no number from 0 to 65535") from error
    return value.rstrip("/")


def optional_base_url(value: str) -> str | None:
    return base_url(value) if value else None


def origins(value: str) -> frozenset[str]:
    """Origins as browsers write them, which is how they are compared; ``*`` alone for all."""
    origins = frozenset(part.strip() for part in value.split(",") if part.strip())
    if origins == {"*"}:
        return origins
    for origin in origins:
        match = re.fullmatch(r"(https?)://(?:[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::([1-9][0-9]{0,4}))?", origin)
        if match is None:
            raise ValueError("must be `*`, or origins such as https://app.example.com: lower case, no path, no slash")
        if match[2] == {"http": "80", "https": "443"}[match[1]] or int(match[2] or 0) > 65_535:
            raise ValueError("has a port that browsers leave out of an origin, or that is no port")
    return origins


def webhook_url(value: str) -> str | None:
    """Kept to the letter; not shown, since such URLs hold their own credentials."""
    if not value:
        return None
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must be a URL such as https://hooks.example.com/abhiapi (the value is not shown here)")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError("has a port that is no number from 0 to 65535 (the value is not shown here)") from error
    return value


def database_url(value: str) -> str:
    try:
        url = make_url(value)
    except ArgumentError as error:
        raise ValueError("is not a database URL such as sqlite:////var/lib/abhiapi/abhiapi.db") from error
    if url.drivername == "postgres":  # as some hosts write it
        url = url.set(drivername="postgresql")
    if url.drivername in ("postgresql", "postgresql+psycopg") and url.database:
        return url.render_as_string(hide_password=False)
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):  # a ledger in memory is none
        raise ValueError("must be a URL such as sqlite:////absolute/path.db or postgresql://user:password@host/name")
    return value


def without_password(url: str) -> str:
    return re.sub(r"(password=)[^&]*", r"\1...", re.sub(r"//.*@", "//...@", url))

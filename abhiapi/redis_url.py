"""The address of a Redis as an operator may write it: what redis-py reads, less what would undo our time limits."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

IN_MEMORY = "memory://"  # no Redis
_OPTIONS = frozenset(("db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"))


def checked(value: str) -> str:
    """The address, if it is one. Raises ValueError, which does not show it."""
    if value == IN_MEMORY:
        return value
    try:
        parts = urlsplit(value)
    except ValueError as error:  # brackets that do not match
        raise ValueError("has a host that cannot be read") from error
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not place or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must be memory://, or redis://, rediss:// or unix:// such as redis://127.0.0.1:6379/0")
    if parts.scheme != "unix" and (not re.fullmatch(r"(/[0-9]{0,5})?", parts.path) or not _has_port(parts)):
        raise ValueError("must end with a port and the number of a database, such as redis://127.0.0.1:6379/0")
    if any(name not in _OPTIONS for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError(f"takes no option but {', '.join(sorted(_OPTIONS))}")
    return value


def _has_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0  # None: the usual one
    except ValueError:
        return False

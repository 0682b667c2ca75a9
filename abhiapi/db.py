"""Storage: the door to it. `database_at` gives the engine that a URL names; everybody else knows `Database` and `Tx`.

Statements are SQLAlchemy Core, compiled once for the engine and then run on its own driver. Whatever differs between
engines is in `db_sqlite` and `db_postgres` (`migrations`, `migrations_postgres` for their schemas), and nowhere else.
No network may be used while a transaction is open: `assert_no_transaction` is called by the module that talks to fal.
"""

from __future__ import annotations

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from abhiapi.db_base import (
    CLI_PATIENCE_S,
    Busy,
    Database,
    OutcomeUnknown,
    Reads,
    RollUp,
    Row,
    Session,
    Tx,
    Written,
    assert_no_transaction,
    marked,
    month_start,
    position,
    utc,
)
from abhiapi.errors import SchemaError

__all__ = [
    "CLI_PATIENCE_S",
    "Busy",
    "Database",
    "OutcomeUnknown",
    "Reads",
    "RollUp",
    "Row",
    "Session",
    "Tx",
    "Written",
    "assert_no_transaction",
    "database_at",
    "marked",
    "month_start",
    "position",
    "utc",
]


def database_at(url: str) -> Database:
    """The database that a URL names; nothing is opened yet. Raises `SchemaError`, which repeats no password."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SchemaError("ABHIAPI_DATABASE_URL is not a database URL such as sqlite:////absolute/path.db") from error
    if parsed.get_backend_name() == "sqlite":
        from abhiapi.db_sqlite import SqliteDatabase

        return SqliteDatabase(parsed)
    if parsed.get_backend_name() == "postgresql":
        from abhiapi.db_postgres import PostgresDatabase  # psycopg takes a while to import, and SQLite needs none of it

        return PostgresDatabase(parsed)
    raise SchemaError(
        f"{parsed.get_backend_name()} is not supported: use sqlite:////absolute/path.db or postgresql://user@host/name"
    )

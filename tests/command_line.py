"""The command line as tests run it: in this process on a real database, or as processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from sqlalchemy import select

from abhiapi import audit, reports, tables
from abhiapi.commands import main
from abhiapi.db import Database, Tx, database_at
from tests.harness import ROOT, environment

NOWHERE = "http://127.0.0.1:9"  # no command of a test may ask fal itself


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """stdout as JSON, numbers with a fraction as Decimals."""
        return json.loads(self.stdout, parse_float=Decimal)

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()

    def refused(self) -> str:
        """The one line of a refusal: exit 1, nothing on stdout."""
        assert (self.exit_code, self.stdout) == (1, ""), self
        lines = [line for line in self.stderr.splitlines() if not line.startswith("created the database ")]
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    def misused(self) -> str:
        """What a wrong usage is told: exit 2, nothing on stdout."""
        assert (self.exit_code, self.stdout) == (2, ""), self
        assert "Traceback" not in self.stderr
        return self.stderr


class CommandLine:
    """`abhiapi` on a database of the test's own: the one that is given, or a file that its first command creates."""

    def __init__(self, folder: Path, database_url: str | None = None) -> None:
        self.path = folder / "abhiapi.db"
        self.settings = {
            "ABHIAPI_DATABASE_URL": database_url or f"sqlite:///{self.path}",
            "FAL_KEY": "id:secret",
            **{f"ABHIAPI_FAL_{name}_URL": NOWHERE for name in ("RUN", "QUEUE", "REST", "API")},
        }

    @property
    def database(self) -> Database:
        return database_at(self.settings["ABHIAPI_DATABASE_URL"])

    def __call__(self, *arguments: str, **settings: str) -> Done:
        """Run a command in this process. Bugs keep their traceback."""
        env: dict[str, str | None] = {name: None for name in environment() if name.startswith(("ABHIAPI_", "FAL_"))}
        result = CliRunner().invoke(main, arguments, env=env | self.settings | settings, prog_name="abhiapi")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    def json(self, *arguments: str) -> Any:
        """What a command prints with --json; it must succeed."""
        done = self(*arguments, "--json")
        assert done.exit_code == 0, done.stderr
        return done.json

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Start `python cli.py` as a process of its own."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *arguments],
            cwd=self.path.parent,
            env=environment(**self.settings | settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def entries(self) -> int:
        """How many entries the whole ledger has, after proof that it adds up."""
        finding = self.database.read(audit.verify)
        assert finding.ok, finding.problems
        return finding.entries

    def dump(self) -> str:
        """Every row of every table, as text."""

        def read(tx: Tx) -> Iterator[str]:
            for table in tables.metadata.sorted_tables:
                rows = tx.all(select(table).order_by(*table.primary_key))
                yield from (f"{table.name} {row!r}" for row in rows)

        return self.database.read(lambda tx: "\n".join(read(tx)))

    def call(self, call_id: int) -> reports.CallRow:
        row = self.database.read(lambda tx: reports.call(tx, call_id))
        assert row is not None
        return row


def finish(process: subprocess.Popen[str], within_s: float = 30) -> Done:
    """Wait for a started command."""
    stdout, stderr = process.communicate(timeout=within_s)
    return Done(process.returncode, stdout, stderr)


def tree(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group there is, by its words."""
    yield path, command
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from tree(sub, (*path, name))

"""What the ledger of this proxy must show after a measurement, asked of its command line as an operator would.

Money is counted in whole micros; credits are read from JSON as Decimal.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

from process import BenchError

CLI = Path(__file__).resolve().parents[1] / "cli.py"
ACCOUNT = "bench"
TOPUP_CREDITS = 100_000_000
MICROS_PER_CREDIT = 1_000
CALL_MICROS = 26_250  # fal-ai/flux/dev: 1 unit x 0.025 USD, plus the default margin of 5 %
TIMEOUT_S = 300


def command_line(*arguments: str) -> list[str]:
    """A command of this checkout, run by the same Python as the benchmark."""
    return [sys.executable, str(CLI), *arguments]


class Books:
    """One account in a new database, and how many calls it may have been charged for."""

    def __init__(self, env: Mapping[str, str], cwd: Path) -> None:
        self._env = env
        self._cwd = cwd
        self._answered = 0
        self._cut = 0

    def open(self) -> str:
        """Create the account with ample credit; its key."""
        key = self._run("keys", "create", ACCOUNT).strip()
        self._run("topup", ACCOUNT, str(TOPUP_CREDITS))
        return key

    def expect(self, answered: int, *, cut: int = 0) -> None:
        """`answered` calls must be charged; `cut` more may be, whose caller hung up when its time was over."""
        self._answered += answered
        self._cut += cut

    def problems(self) -> list[str]:
        """Everything that does not add up; call it when the server has stopped."""
        found = []
        verify = json.loads(self._run("ledger", "verify", "--json", refusal_is_output=True), parse_float=Decimal)
        if verify["ok"] is not True:
            found.append(f"ledger verify: {verify['problems']}")
        account = json.loads(self._run("balance", ACCOUNT, "--json"), parse_float=Decimal)
        if account["held"] != 0:
            found.append(f"{account['held']} credits are still held")
        spent_micros = TOPUP_CREDITS * MICROS_PER_CREDIT - int(Decimal(account["balance"]) * MICROS_PER_CREDIT)
        charged, rest = divmod(spent_micros, CALL_MICROS)
        most = self._answered + self._cut
        if rest or not self._answered <= charged <= most:
            due = f"{self._answered}" if most == self._answered else f"{self._answered} to {most}"
            found.append(
                f"{spent_micros} micros were charged: {charged} calls and {rest} micros, but {due} calls were made"
            )
        return found

    def _run(self, *arguments: str, refusal_is_output: bool = False) -> str:
        done = subprocess.run(
            command_line(*arguments),
            check=False,
            env=dict(self._env),
            cwd=self._cwd,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode and not (refusal_is_output and done.stdout):
            raise BenchError(f"cli.py {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

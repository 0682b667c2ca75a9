"""What the commands' parameters mean: the kinds of text, durations and amounts people type, and shared options."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, TypeVar

import click

from abhiapi.errors import BadRequest
from abhiapi.money import Micros, parse_amount

Command = TypeVar("Command", bound=Callable[..., Any])

_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
_DURATION = re.compile(r"([0-9]{1,6})([smhdw])")
_DURATION_MAX_MS = 100 * 365 * _MS["d"]
_END_OF_DAY = time(23, 59, 59, 999_000, UTC)
_NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)
_ZERO = re.compile(r"\+?0+(\.0+)?")


class Text(click.ParamType):  # type: ignore[type-arg]  # generic in newer Clicks only
    """A line of text: not blank, of bounded length, nothing that could steer a terminal or is no character at all."""

    name = "text"

    def __init__(self, length_max: int = 200) -> None:
        self.length_max = length_max

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.strip():
            self.fail("it is empty", param, ctx)
        if len(text) > self.length_max:
            self.fail(f"it is longer than {self.length_max} characters", param, ctx)
        if not text.isprintable():
            self.fail("it has a line break, another control character or bytes that are no UTF-8", param, ctx)
        return text


class AmountCommand(click.Command):
    """A command with an amount, which may be typed with a minus sign: ``-5`` is an amount here and no option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            super().parse_args(ctx, args)
        except click.MissingParameter:
            known = {name for param in self.get_params(ctx) for name in param.opts}
            for text in typed:
                if text.startswith("--") and text.partition("=")[0] not in known | {"--"}:
                    raise click.NoSuchOption(text, ctx=ctx) from None
            raise
        texts = [ctx.params[param.name] for param in self.params if isinstance(param, click.Argument) and param.name]
        for text in [*texts, *ctx.args]:
            if isinstance(text, str) and len(text) > 1 and text.startswith("-") and not _NEGATIVE.match(text):
                raise click.NoSuchOption(text, ctx=ctx)
        if ctx.args and not ctx.resilient_parsing:
            raise click.UsageError(f"Got unexpected extra arguments ({' '.join(ctx.args)})", ctx)
        return ctx.args


def account_argument(command: Command) -> Command:
    return click.argument("account", metavar="ACCOUNT", type=Text())(command)


def key_argument(command: Command) -> Command:
    return click.argument("key", metavar="KEY", type=Text())(command)


def call_argument(command: Command) -> Command:
    return click.argument("call_id", metavar="CALL_ID", type=Text())(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, with exact numbers.")(command)


def usd_option(command: Command) -> Command:
    return click.option("--usd", is_flag=True, help="AMOUNT is in US dollars; 1 USD is 1000 credits.")(command)


def force_option(text: str) -> Callable[[Command], Command]:
    return click.option("--force", is_flag=True, help=text)


def page_options(command: Command) -> Command:
    """--limit and --cursor, for lists that may be long."""
    cursor = click.option("--cursor", type=Text(), help="Go on after this: next_cursor of the page before.")
    limit = click.option(
        "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most this many."
    )
    return limit(cursor(command))


def parse_duration_ms(text: str) -> int:
    """Milliseconds of ``30m``, ``24h``, ``90d``, ``2w``. Raises `BadRequest` saying what is expected."""
    match = _DURATION.fullmatch(text)
    if match is None and text != "0":
        raise BadRequest(f"{text[:40]!r} is no duration: write a whole number and s, m, h, d or w, such as 24h or 90d")
    duration_ms = int(match[1]) * _MS[match[2]] if match else 0
    if duration_ms > _DURATION_MAX_MS:
        raise BadRequest(f"{text} is longer than a hundred years")
    return duration_ms


def parse_expiry_ms(text: str, *, now_ms: int) -> int:
    """When something expires: a duration from now, or the end of a day such as ``2026-12-31`` (UTC)."""
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        try:
            end = datetime.combine(date.fromisoformat(text), _END_OF_DAY)
        except ValueError as error:
            raise BadRequest(f"{text} is no day of the calendar") from error
        expiry_ms = (end - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)
    elif re.fullmatch(r"[0-9]+[smhdw]", text):
        expiry_ms = now_ms + parse_duration_ms(text)
    else:
        raise BadRequest(
            f"{text[:40]!r} is no expiry: write a duration such as 90d or 12h, or a day such as 2026-12-31"
        )
    if expiry_ms <= now_ms:
        raise BadRequest(f"{text} is not in the future: the key would never work")
    return expiry_ms


def parse_credits_or_zero(text: str) -> Micros:
    """An amount of credits that may be zero. Raises `BadAmount`."""
    return Micros(0) if _ZERO.fullmatch(text) else parse_amount(text)


def usage_error(option: str, error: Exception) -> click.BadParameter:
    """A badly written option, told the way Click tells it (exit 2)."""
    return click.BadParameter(str(error), param_hint=f"'{option}'")

"""`prices` and `estimate`: what models cost here, and what a call would hold."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import AmountCommand, Text, force_option, json_option, usage_error
from abhiapi.commands.output import print_one, print_rows, say
from abhiapi.errors import BadAmount, Refused, UnpricedModel
from abhiapi.money import Micros, credits, parse_amount

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.pricing import Catalogue, OwnPrice, Price

COLUMNS = ("model", "unit", "unit_price_usd", "fal_unit_price_usd", "margin")
TIMES_MAX = 100  # a new price above this many times the old one is taken for a typing error


@click.group()
def prices() -> None:
    """Prices: what a unit of each model costs here.

    A price is fal's own plus ABHIAPI_MARGIN unless you set another; a server takes fal's prices over once a day. A
    call pays the price of the moment at which it was admitted.

    \b
    Examples:
      abhiapi prices list seedance
      abhiapi prices show fal-ai/flux/dev
      abhiapi prices set fal-ai/flux/dev --margin 0.2
      abhiapi prices sync
      abhiapi prices check
    """


@prices.command("list")
@click.argument("substring", required=False, type=Text())
@json_option
def list_prices(substring: str | None, as_json: bool) -> None:
    """List the prices of all models.

    SUBSTRING, if given, keeps the models whose name contains it.

    \b
    Examples:
      abhiapi prices list
      abhiapi prices list kling-video --json
    """
    wanted = (substring or "").lower()
    found = [price for price in session.read(session.catalogue) if wanted in price.model.lower()]
    print_rows(
        [library.shapes.price(price) for price in found],
        COLUMNS,
        as_json=as_json,
        none=f"no model's name contains {substring!r}: `abhiapi prices list` shows all",
    )


@prices.command("show")
@click.argument("model", type=Text())
@json_option
def show_price(model: str, as_json: bool) -> None:
    """Show the price of one model.

    MODEL is its path at fal.run, such as fal-ai/flux/dev.

    \b
    Examples:
      abhiapi prices show fal-ai/flux/dev
    """
    price = _price_of(session.read(session.catalogue), model)
    print_one(library.shapes.price(price), as_json=as_json)


@prices.command("set", cls=AmountCommand)
@click.argument("model", type=Text())
@click.option("--unit-price", metavar="USD", help="What the customer pays for one of fal's billable units.")
@click.option("--unit", type=Text(40), help="What a unit is called: megapixels, seconds, images ...")
@click.option("--margin", metavar="M", help="Added to fal's unit price: 0.05 is five percent.")
@click.option("--hold", metavar="CREDITS", help="Hold this much for each call; auto computes it from the call again.")
@force_option(f"Accept a price more than {TIMES_MAX} times the one before.")
@json_option
def set_price(
    model: str,
    unit_price: str | None,
    unit: str | None,
    margin: str | None,
    hold: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Set your own price of a model, from the next call on.

    MODEL is its path at fal.run, such as fal-ai/flux/dev; it may be one that is not in the price list yet. Or a
    pattern such as fal-ai/kling-video/*, which prices every known model below it; a model's own price goes before a
    pattern's, a longer pattern's before a shorter's. Give either --unit-price and --unit, or --margin. A hold set
    earlier stays unless --hold says otherwise.

    \b
    Examples:
      abhiapi prices set fal-ai/flux/dev --margin 0.2
      abhiapi prices set "fal-ai/kling-video/*" --margin 0.15
      abhiapi prices set acme/new-model --unit-price 0.04 --unit images --hold 80
    """
    if (unit_price is None) == (margin is None):
        raise click.UsageError("give either --unit-price and --unit, or --margin")
    if (unit_price is None) != (unit is None):
        raise click.UsageError("--unit-price and --unit go together")
    price_usd, own_margin = _parse_price("--unit-price", unit_price), _parse_price("--margin", margin)
    hold_micros = None if hold in (None, "auto") else _parse_hold(str(hold))
    name = library.prices.check_model(model, or_pattern=True)

    def op(tx: Tx) -> tuple[Catalogue, Catalogue]:
        before = session.catalogue(tx)
        if own_margin is not None and not name.endswith("*"):
            old = before.price_of(name) if name in before else None
            if old is None or old.fal_unit_price_usd is None:
                raise Refused(
                    f"fal's price of {name} is not known, so a margin over it means nothing: use --unit-price"
                )
        library.prices.set_own(
            tx,
            name,
            unit=unit,
            unit_price_usd=price_usd,
            margin=own_margin,
            hold_micros=_own_hold(tx, name) if hold is None else hold_micros,
            now_ms=session.now_ms(),
        )
        after = session.catalogue(tx)
        if not force:
            _refuse_jump(before, after)
        return before, after

    before, after = session.write(op)
    _tell_set(name, before, after, says_of_hold=hold is None, as_json=as_json)


def _tell_set(name: str, before: Catalogue, after: Catalogue, *, says_of_hold: bool, as_json: bool) -> None:
    """What a price that was set has changed."""
    changed = [price for price in after if _was(before, price.model) != price]
    free = [price.model for price in changed if price.unit_price_usd == 0]
    if free:
        say(f"{', '.join(free)} {'is' if len(free) == 1 else 'are'} free from now on")
    if name.endswith("*"):
        _say_pattern(changed, as_json=as_json)
        return
    price = after.price_of(name)
    if price.hold_micros is not None and not price.hold_is_guess and says_of_hold:
        say(f"each call of {price.model} holds {credits(price.hold_micros)} credits, as before (--hold auto ends that)")
    print_one(library.shapes.price(price), as_json=as_json)


@prices.command("unset")
@click.argument("model", type=Text())
@json_option
def unset_price(model: str, as_json: bool) -> None:
    """Take your own price of a model or pattern back, from the next call on.

    MODEL is as `prices set` took it. What is next in line counts again: a pattern's price, or fal's price and the
    general margin.

    \b
    Examples:
      abhiapi prices unset fal-ai/flux/dev
      abhiapi prices unset "fal-ai/kling-video/*"
    """
    name = library.prices.check_model(model, or_pattern=True)

    def op(tx: Tx) -> tuple[Catalogue, Catalogue]:
        if name not in {price.model for price in library.prices.own_prices(tx)}:
            raise Refused(f"{name} has no price of your own: nothing was changed")
        before = session.catalogue(tx)
        library.prices.set_own(
            tx, name, unit=None, unit_price_usd=None, margin=None, hold_micros=None, now_ms=session.now_ms()
        )
        return before, session.catalogue(tx)

    before, after = session.write(op)
    for lost in before:
        if lost.model not in after:
            say(f"{lost.model} has no price from now on, so calls to it are refused")
    _say_pattern([price for price in after if _was(before, price.model) != price], as_json=as_json)


@click.command()
@click.argument("model", type=Text())
@click.option("--input", "text", metavar="JSON", default="{}", help="The JSON object that the call would send.")
@json_option
def estimate(model: str, text: str, as_json: bool) -> None:
    """Compute what a call would hold, in credits.

    That is the most it should cost. MODEL is its path at fal.run, such as fal-ai/flux/dev. Nothing is sent to fal
    and nothing is held.

    \b
    Examples:
      abhiapi estimate fal-ai/flux/dev
      abhiapi estimate fal-ai/flux/dev --input '{"image_size": "square_hd", "num_images": 4}'
    """
    try:
        call_input = library.jsonbytes.parse(text.encode())
    except ValueError as error:
        raise usage_error("--input", ValueError(f"it is not JSON: {error}")) from error
    if not isinstance(call_input, dict):
        raise usage_error("--input", ValueError('it is no JSON object such as {"num_images": 2}'))
    price = _price_of(session.read(session.catalogue), model)
    ceiling = library.pricing.ceiling(price, call_input)
    shape = {"model": price.model, "credits": credits(ceiling.amount_micros), "basis": ceiling.basis}
    print_one(shape, as_json=as_json)


def _price_of(catalogue: Catalogue, text: str) -> Price:
    """The price of a model as an operator writes it. Raises `UnpricedModel`, with what to do."""
    model = text.strip("/").removesuffix("/stream")  # which a model's price covers
    try:
        return catalogue.price_of(model)
    except UnpricedModel as error:
        raise UnpricedModel(
            f"{model!r} has no price, so calls to it are refused: `abhiapi prices list` shows the models there are, "
            "`abhiapi prices set` adds one"
        ) from error


def _was(before: Catalogue, model: str) -> Price | None:
    return before.price_of(model) if model in before else None


def _refuse_jump(before: Catalogue, after: Catalogue) -> None:
    """Raises `Refused` where a price becomes more than `TIMES_MAX` times what it was."""
    for new in after:
        old = _was(before, new.model)
        if old is not None and 0 < old.unit_price_usd * TIMES_MAX < new.unit_price_usd:
            now, until_now = (library.pricing.decimal_text(price.unit_price_usd) for price in (new, old))
            raise Refused(
                f"{now} USD is more than {TIMES_MAX} times the price of {new.model} until now, {until_now} USD: "
                "nothing was changed; --force sets it all the same"
            )


def _say_pattern(changed: list[Price], *, as_json: bool) -> None:
    """The prices that are others now."""
    print_rows(
        [library.shapes.price(price) for price in changed],
        COLUMNS,
        as_json=as_json,
        none="no model's price is another now",
    )


def _parse_price(option: str, text: str | None) -> Decimal | None:
    try:
        return None if text is None else library.pricing.parse_price(text)
    except ValueError as error:
        raise usage_error(option, error) from error


def _parse_hold(text: str) -> Micros:
    try:
        return parse_amount(text)
    except BadAmount as error:
        raise usage_error("--hold", error) from error


def _own_hold(tx: Tx, model: str) -> Micros | None:
    """The fixed hold that the operator set for a model before."""
    own: dict[str, OwnPrice] = {price.model: price for price in library.prices.own_prices(tx)}
    return own[model].hold_micros if model in own else None

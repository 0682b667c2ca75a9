"""The demo's link, which signs in without a password: shown to whoever sits at the machine, and to no stranger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask

from abhiapi import accounts, runtime, serving
from abhiapi.db import Database
from abhiapi.settings import Settings
from abhiapi.web import create_app
from abhiapi.web.pages import demo
from tests.harness import OPERATOR_KEY

LINK = "/dashboard/demo/the-link"
PAGES = ("/", "/docs", "/docs/clients", "/docs/nothing")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'abhiapi.db'}"})


@pytest.fixture
def app(settings: Settings) -> Iterator[Flask]:
    rt = runtime.start(settings)
    yield create_app(rt)
    rt.close()


def shown(app: Flask, *, host: str = "127.0.0.1:8000", address: str = "127.0.0.1", **headers: str) -> set[bool]:
    """Whether the link is on the pages, asked for so."""
    accepted = {"Host": host, "Accept": "text/html"} | {name.replace("_", "-"): text for name, text in headers.items()}
    client = app.test_client()
    asked = [client.get(path, headers=accepted, environ_base={"REMOTE_ADDR": address}) for path in PAGES]
    return {LINK in page.text for page in asked}


def test_no_page_has_it_where_the_server_offers_none(app: Flask) -> None:
    assert shown(app) == {False}


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.0.0.1"])
def test_whoever_sits_at_the_machine_finds_it_on_every_page(app: Flask, host: str) -> None:
    demo.offer(app, LINK)
    assert shown(app, host=host) == shown(app, host=host, address="::1") == {True}
    page = app.test_client().get("/", headers={"Host": host})
    assert page.headers["Cache-Control"] == "no-store"


def test_no_stranger_finds_it(app: Flask) -> None:
    """Another address; a proxy in front, whose strangers come from this machine; a name that only leads here."""
    demo.offer(app, LINK)
    assert shown(app, address="192.0.2.7") == {False}
    assert shown(app, address="not an address") == {False}
    for host in (
        "demo.example.com",
        "evil.example:8000",
        "192.0.2.7:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.x",
    ):
        assert shown(app, host=host) == {False}, host
    for header in ("X_Forwarded_For", "Forwarded", "Via", "X_Real_IP", "X_Forwarded_Host", "X_Forwarded_Proto"):
        assert shown(app, **{header: "127.0.0.1"}) == {False}, header


@pytest.mark.parametrize("more", [{"ABHIAPI_TRUSTED_PROXIES": "1"}, {"ABHIAPI_PUBLIC_URL": "http://127.0.0.1:8000"}])
def test_a_server_that_is_set_up_for_others_shows_it_to_nobody(tmp_path: Path, more: dict[str, str]) -> None:
    env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'abhiapi.db'}"}
    rt = runtime.start(Settings.from_env(env | more))
    app = create_app(rt)
    demo.offer(app, LINK)
    assert shown(app) == {False}
    rt.close()


def test_it_is_offered_for_books_that_began_as_the_demos_alone(settings: Settings, database: Database) -> None:
    """Not where real customers' accounts are older, nor where others are served."""
    serving.demo_key(settings)
    assert serving.may_offer_demo(settings, "127.0.0.1")
    assert serving.may_offer_demo(settings, "::1")
    assert not serving.may_offer_demo(settings, "0.0.0.0")
    assert not serving.may_offer_demo(settings, "192.0.2.7")
    assert not serving.may_offer_demo(settings, "some-host")
    database.write(lambda tx: accounts.create(tx, "another", now_ms=1))
    assert serving.may_offer_demo(settings, "127.0.0.1")


def test_it_is_not_offered_over_books_of_customers(settings: Settings, database: Database) -> None:
    database.write(lambda tx: accounts.create(tx, "acme", now_ms=1))
    serving.demo_key(settings)
    assert not serving.may_offer_demo(settings, "127.0.0.1")

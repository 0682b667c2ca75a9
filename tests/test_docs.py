"""The docs say what the program does: every setting, route, error type and command stands in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from flask import Flask
from flask_limiter import Limiter

from abhiapi import errors, settings
from abhiapi.web import api
from abhiapi.web.pages import assets, reference, texts
from tests.harness import ROOT

API = (ROOT / "docs/api.md").read_text()
README = (ROOT / "README.md").read_text()


def error_types(of: type[errors.AbhiError] = errors.AbhiError) -> Iterator[str]:
    yield of.type
    for sub in of.__subclasses__():
        yield from error_types(sub)


def flask_app() -> Flask:
    """Flask's share of the application: all routes but those of calls."""
    app = Flask("routes", static_folder=None)
    app.register_blueprint(api.blueprint(Limiter(lambda: "", app=app, storage_uri="memory://"), "1 per minute"))
    app.register_blueprint(reference.blueprint())
    app.register_blueprint(assets.Assets().blueprint())
    return app


def routes() -> list[str]:
    rules = [rule.rule for rule in flask_app().url_map.iter_rules()]
    return [re.sub(r"<(\w+)>", r"{\1}", rule) for rule in rules if not rule.startswith("/static/")]


@pytest.mark.parametrize("error_type", sorted(set(error_types())))
def test_every_error_type_is_documented(error_type: str) -> None:
    assert f"`{error_type}`" in API


@pytest.mark.parametrize("route", routes())
def test_every_route_is_documented(route: str) -> None:
    assert re.search(rf"(GET|POST) {re.escape(route)}[`?]", API), route


@pytest.mark.parametrize("variable", settings.variables(), ids=lambda variable: variable.name)
def test_every_setting_is_in_the_readme(variable: settings.Variable) -> None:
    assert f"`{variable.name}`" in README


def test_generated_pages_are_up_to_date() -> None:
    """docs/cli.md holds every command's help, docs/settings.md every setting, as they are now."""
    checked = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", texts.names())
def test_what_customers_read_has_nothing_that_only_an_operator_can_do(name: str) -> None:
    """Settings, commands and our tests are for docs/operations.md and docs/architecture.md."""
    guide = (ROOT / f"docs/{name}.md").read_text()
    assert (
        re.findall(r"ABHIAPI_[A-Z_]+|`abhiapi [a-z]+|tests/\w+", re.sub(r"```.*?```", "", guide, flags=re.DOTALL)) == []
    )
    assert not re.findall(r"^ABHIAPI_", guide, re.MULTILINE)


def test_a_row_of_a_table_stands_on_its_own_line() -> None:
    """As many cells as the head has, in every table of what customers read: merges have joined rows before."""
    for name in texts.names():
        width = 0
        for line in re.sub(r"```.*?```", "", (ROOT / f"docs/{name}.md").read_text(), flags=re.DOTALL).splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            width = width or cells
            assert cells in (0, width), (name, line)
            width = cells

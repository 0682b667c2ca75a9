"""The reference pages as they leave the server: the seed's promises, live prices and limits, this host, and safety."""

from __future__ import annotations

import gzip
import html
import json
import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from flask.testing import FlaskClient

from abhiapi import pricing, runtime
from abhiapi.settings import Settings
from abhiapi.web import create_app
from abhiapi.web.pages import price_table, texts
from tests import page_text
from tests.harness import OPERATOR_KEY, ROOT, Server
from tests.page_text import Said

SEED = (ROOT / "tests/data/api-reference.txt").read_text().splitlines()
SEED_HOST = "https://fal.abhibots.com"
GUIDES = ("any-client", "api", "browser", "clients", "uploads", "webhooks")
PAGES = ("/", "/docs", "/docs/", *(f"/docs/{name}" for name in GUIDES))
COMPRESSED_BYTES_MAX = 100_000
MANY_MODELS = 1400
SLOWER_MOST = 8  # times, with ten times as many models: they are all looked through


def page(server: Server, path: str = "/", **params: str) -> Said:
    response = requests.get(server.url + path, params=params, timeout=30)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    return page_text.read(response.text)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Callable[..., FlaskClient]]:
    """The application in this process: a function of settings, and of the catalogue's rules."""
    running = []

    def make(rules: tuple[pricing.PriceRule, ...] | None = None, **settings: str) -> FlaskClient:
        env = {"FAL_KEY": OPERATOR_KEY, "ABHIAPI_DATABASE_URL": f"sqlite:///{tmp_path / 'abhiapi.db'}"} | settings
        running.append(runtime.start(Settings.from_env(env), rules=rules))
        return create_app(running[-1]).test_client()

    yield make
    for rt in running:
        rt.close()


# --- what the seed promises -------------------------------------------------------------------------------------


def page_count(said: Said) -> int:
    """How many pages the price list has, as the page says."""
    (count,) = re.findall(r"Page \d+ of (\d+)", "\n".join(said.lines))
    return int(count)


def is_price(line: str) -> bool:
    return " \N{EN DASH} $" in line or line == "TypeModelsPrice"


def bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.fixture(scope="module")
def free_lines(fal: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The page of a server with the limits that the seed names."""
    settings = {"ABHIAPI_RATE_PER_MINUTE": "30", "ABHIAPI_CONCURRENCY": "5"}
    with Server.started(
        tmp_path_factory.mktemp("reference"), fal.url, ABHIAPI_PUBLIC_URL=SEED_HOST, **settings
    ) as server:
        return [bare(line) for line in page(server).lines]


@pytest.mark.parametrize("line", [line for line in SEED if line.strip() and not is_price(line)])
def test_every_line_of_the_seed_is_on_the_page(free_lines: list[str], line: str) -> None:
    """Word for word; a line of the page may say more."""
    assert [said for said in free_lines if bare(line) in said]


def test_the_sections_stand_in_the_seeds_order(free_lines: list[str]) -> None:
    wanted = """How It Works|Authentication|Quick Start|Transparent Proxy|Response Format|Billing & Pricing|Error Codes
        |Rate Limits""".split("|")
    start = free_lines.index("APIReference", free_lines.index("v1"))
    places = [free_lines.index(bare(name), start) for name in wanted]
    assert places == sorted(places)


def test_the_kinds_of_the_price_table_are_the_seeds(free_lines: list[str]) -> None:
    names = [re.match(r"(\w+ Generation|\w+ Video|Upscaling)", line) for line in SEED if is_price(line)]
    for name in filter(None, names):
        assert [said for said in free_lines if said.startswith(bare(name[0]))], name[0]


# --- prices, limits, host ---------------------------------------------------------------------------------------


def test_prices_are_those_of_the_catalogue(shared_server: Server) -> None:
    """Every model is found by its name, with the price that `/v1/prices` has."""
    listed = requests.get(f"{shared_server.url}/v1/prices", timeout=30)
    prices = {price["model"]: price for price in json.loads(listed.text, parse_float=Decimal)["prices"]}
    seen = {}
    for number in range(1, page_count(page(shared_server)) + 1):
        rows = requests.get(f"{shared_server.url}/?page={number}&part=prices", timeout=30).text.replace("<wbr>", "")
        row = r">([^<]+)</a></th><td[^>]*>([\d.]+)</td><td[^>]*>\$([\d.]+) <"
        for model, credits, usd in re.findall(row, rows):
            seen[model] = (Decimal(credits), Decimal(usd))
    assert seen == {name: (p["unit_price_usd"] * 1000, p["unit_price_usd"]) for name, p in prices.items()}


def test_an_operators_price_is_on_the_page_at_once(app: Callable[..., FlaskClient]) -> None:
    """The margin of the settings, too: nothing is printed into the page."""
    text = app(ABHIAPI_MARGIN="1").get("/?q=fal-ai/flux/dev").text
    assert "$0.05 <" in text
    assert ">50<" in text


@pytest.mark.parametrize(
    ("query", "found"),
    [("kling-video v2 master", "kling-video"), ("KLING-VIDEO", "kling-video"), ("  flux/dev  ", "flux/dev")],
)
def test_models_are_found_without_a_script(shared_server: Server, query: str, found: str) -> None:
    """Every word has to be in the model's name or unit, in whatever case."""
    said = page(shared_server, q=query)
    models = [urlsplit(link).path.removeprefix("/models/") for link in said.links if "fal.ai/models/" in link]
    assert models
    assert all(found in model for model in models)
    assert len(models) < len(pricing.shipped_rules())


def test_nothing_found_is_said_so(shared_server: Server) -> None:
    assert "No model matching “no-such-model”" in page(shared_server, q="no-such-model").lines


@pytest.mark.parametrize("number", ["0", "-1", "x", "999999999999", "9999", "\u0663", ""])
def test_a_page_that_is_none_is_the_nearest(shared_server: Server, number: str) -> None:
    said = page(shared_server, page=number)
    assert page_count(said) > 1
    assert [link for link in said.links if "fal.ai/models/" in link]


def test_pages_of_the_list_lead_to_each_other(shared_server: Server) -> None:
    seen: list[str] = []
    path = "/?q=fal-ai"
    while path:
        said = page(shared_server, path)
        models = [link for link in said.links if "fal.ai/models/" in link]
        assert len(models) <= price_table.PAGE_ROWS
        seen += models
        text = requests.get(shared_server.url + path, timeout=30).text
        following = re.search(r'rel="next" href="([^"#]+)', text)
        path = html.unescape(following[1]) if following else ""
    listed = [rule.model for rule in pricing.shipped_rules() if "fal-ai" in rule.model]
    assert len(set(seen)) == len(seen) >= len(listed) > price_table.PAGE_ROWS


def test_limits_are_those_of_the_settings(app: Callable[..., FlaskClient]) -> None:
    client = app(
        ABHIAPI_RATE_PER_MINUTE="31", ABHIAPI_CONCURRENCY="6",
        ABHIAPI_PRO_RATE_PER_MINUTE="301", ABHIAPI_PRO_CONCURRENCY="41",
    )  # fmt: skip
    lines = [bare(line) for line in page_text.read(client.get("/").text).lines]
    assert "Requestsperminute31/key301/key" in lines
    assert "Concurrentrequests6/key41/key" in lines
    assert "429TooManyRequestsRatelimitexceeded(31req/minperkey)" in lines


def test_examples_name_the_host_that_was_asked(shared_server: Server, app: Callable[..., FlaskClient]) -> None:
    """`ABHIAPI_PUBLIC_URL`, else the request's; the example's host is nowhere left."""
    for path in PAGES:
        text = requests.get(shared_server.url + path, timeout=30).text
        assert shared_server.url.removeprefix("http://") in text
        assert "example.com/fal-ai" not in text
        assert "fal.example.com" not in text
    client = app(ABHIAPI_PUBLIC_URL="https://api.example.org/fal")
    assert "curl -X POST https://api.example.org/fal/fal-ai/flux/dev" in client.get("/").text
    guide = client.get("/docs/clients").text
    assert "# export FAL_QUEUE_RUN_HOST=api.example.org/fal/queue" in guide


@pytest.mark.parametrize(
    "host", ["<script>alert(1)</script>", '"><b>', "evil.example.com/x", "no host", "a'onload='x", "&lt;"]
)
@pytest.mark.parametrize("path", ["/", "/docs/clients", "/openapi.json"])
def test_a_host_that_is_none_is_not_repeated(shared_server: Server, host: str, path: str) -> None:
    response = requests.get(shared_server.url + path, headers={"Host": host}, timeout=30)
    assert response.status_code in (200, 400)
    assert host not in response.text


@pytest.mark.parametrize(
    "query", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}}", "a" * 5000]
)
def test_what_is_searched_for_is_only_text(shared_server: Server, query: str) -> None:
    text = requests.get(shared_server.url, params={"q": query}, timeout=30).text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "49" not in page_text.read(text).lines
    assert len(text) < 60_000


# --- guides -----------------------------------------------------------------------------------------------------


def test_the_guides_are_all_there() -> None:
    assert tuple(texts.names()) == GUIDES


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_says_what_its_text_says(shared_server: Server, name: str) -> None:
    """Headings and every example, byte for byte but for the host: the examples are those that other tests run."""
    source = (ROOT / "docs" / f"{name}.md").read_text()
    host = shared_server.url.removeprefix("http://")
    said = page(shared_server, f"/docs/{name}")
    wanted = [
        block.replace("https://fal.example.com", shared_server.url).replace("fal.example.com", host)
        for block in re.findall(r"^```\w*\n(.*?)^```", source, re.DOTALL | re.MULTILINE)
    ]
    assert [block.text for block in said.blocks] == wanted
    for heading in re.findall(r"^##? (.+)$", re.sub(r"```.*?```", "", source, flags=re.DOTALL), re.MULTILINE):
        assert re.sub(r"`", "", heading) in said.lines


def test_raw_html_of_a_text_is_shown_and_not_passed_on() -> None:
    rendered = texts._parser().render("<script>alert(1)</script>\n\n[x](javascript:alert(1))\n\n```\n<b>\n```\n")
    assert "<script" not in rendered
    assert "href" not in rendered
    assert "&lt;b&gt;" in rendered


@pytest.mark.parametrize("path", PAGES)
def test_every_link_and_every_anchor_leads_somewhere(shared_server: Server, path: str) -> None:
    said = page(shared_server, path)
    assert len(said.ids) == len(set(said.ids))
    for link in {*said.links, *said.loaded}:
        parts = urlsplit(urljoin(shared_server.url + path, link))
        if parts.netloc != urlsplit(shared_server.url).netloc:
            assert (parts.scheme, parts.netloc) == ("https", "fal.ai"), link
            assert link not in said.loaded
            continue
        if parts.path.startswith("/dashboard"):  # another blueprint's
            continue
        ids = ids_at(f"{shared_server.url}{parts.path}?{parts.query}")
        assert not parts.fragment or parts.fragment in ids, link


@cache
def ids_at(url: str) -> list[str]:
    """Of what is there, and has to be; many pages lead to the same."""
    answer = requests.get(url, timeout=30)
    assert answer.status_code == 200, url
    return page_text.read(answer.text).ids if answer.headers["Content-Type"].startswith("text/html") else []


@pytest.mark.parametrize("path", ["/docs/nothing", "/docs/no/such", "/docs/operations"])
def test_a_wrong_turn_is_a_page_for_people_and_an_error_for_programs(shared_server: Server, path: str) -> None:
    """By what is asked for: browsers name HTML, and the page leads on; others get the JSON of every error."""
    browsers = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    told = requests.get(shared_server.url + path, headers=browsers, timeout=30)
    assert (told.status_code, told.headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert "/docs/clients" in page_text.read(told.text).links
    assert "default-src 'none'" in told.headers["Content-Security-Policy"]
    for accept in ("*/*", "application/json", "application/json, text/html"):
        answer = requests.get(shared_server.url + path, headers={"Accept": accept}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "unknown_route")


@pytest.mark.parametrize("path", ["/docs/nothing", "/docs/../api", "/docs/api.md", "/docs/operations", "/docs/%2e%2e"])
def test_no_other_file_is_served(shared_server: Server, path: str) -> None:
    response = requests.Request("GET", shared_server.url).prepare()
    response.url = shared_server.url + path
    answer = requests.Session().send(response, timeout=30)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["type"] in ("unknown_route", "forbidden_path", "missing_key")


# --- headers, sizes, times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/openapi.json"])
def test_pages_are_strict_about_what_they_load(shared_server: Server, path: str) -> None:
    response = requests.get(shared_server.url + path, timeout=30)
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize("path", [*PAGES, "/openapi.json"])
def test_pages_are_compressed_for_those_who_ask(shared_server: Server, path: str) -> None:
    plain = requests.get(shared_server.url + path, headers={"Accept-Encoding": "identity"}, timeout=30)
    with requests.get(
        shared_server.url + path, headers={"Accept-Encoding": "gzip"}, stream=True, timeout=30
    ) as squeezed:
        body = squeezed.raw.read(decode_content=False)
    assert "Content-Encoding" not in plain.headers
    assert squeezed.headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in squeezed.headers["Vary"]
    assert squeezed.headers["Vary"] == plain.headers["Vary"]
    assert int(squeezed.headers["Content-Length"]) == len(body) < len(plain.content)
    assert gzip.decompress(body) == plain.content


def test_a_page_that_has_not_changed_is_not_sent_again(shared_server: Server) -> None:
    first = requests.get(shared_server.url, timeout=30)
    again = requests.get(shared_server.url, headers={"If-None-Match": first.headers["ETag"]}, timeout=30)
    assert (again.status_code, again.content) == (304, b"")
    other = requests.get(f"{shared_server.url}/?q=x", headers={"If-None-Match": first.headers["ETag"]}, timeout=30)
    assert other.status_code == 200


def test_browsers_that_came_by_tls_are_told_to_stay_there(app: Callable[..., FlaskClient]) -> None:
    """Also where a web server in front ends it."""
    client = app(ABHIAPI_TRUSTED_PROXIES="1")
    assert "Strict-Transport-Security" not in client.get("/").headers
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "api.example.org", "X-Forwarded-For": "192.0.2.1"}
    told = client.get("/", headers=forwarded)
    assert told.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "curl -X POST https://api.example.org/fal-ai/flux/dev" in told.text


def test_files_may_be_kept_as_long_as_they_are_the_same(shared_server: Server) -> None:
    (named,) = [link for link in page(shared_server).loaded if "reference.css" in link]
    assert "immutable" in requests.get(shared_server.url + named, timeout=30).headers["Cache-Control"]
    for other in ("/static/reference.css", "/static/reference.css?v=old"):
        assert requests.get(shared_server.url + other, timeout=30).headers["Cache-Control"] == "no-cache"


def test_a_full_price_list_is_small_and_quick(app: Callable[..., FlaskClient]) -> None:
    """With as many models as fal has: under 100 kB with all that the page loads, and slower in proportion at most."""
    (rule, *_) = pricing.shipped_rules()

    def listing(models: int) -> FlaskClient:
        names = [f"fal-ai/model-{n}/text-to-video" for n in range(1, models + 1)]
        one = Decimal(1)
        return app(
            tuple(pricing.PriceRule(name, "seconds", one, "test", "2026-11-22", rule.estimate) for name in names)
        )

    few, many = listing(MANY_MODELS // 10), listing(MANY_MODELS)
    first = many.get("/", headers={"Accept-Encoding": "gzip"})
    assert f"All {MANY_MODELS} models" in gzip.decompress(first.data).decode()
    loaded = page_text.read(gzip.decompress(first.data).decode()).loaded
    files = [many.get(link, headers={"Accept-Encoding": "gzip"}).data for link in set(loaded)]
    assert len(first.data) + sum(map(len, files)) < COMPRESSED_BYTES_MAX
    for path in ("/", "/?q=model-7&page=2", "/?q=nothing", "/?part=prices"):
        best = [min(_took_ns(client, path) for _ in range(9)) for client in (few, many)]
        assert best[1] < SLOWER_MOST * best[0], path


def _took_ns(client: FlaskClient, path: str) -> int:
    """Of this thread's own time: others use this machine too."""
    started = time.thread_time_ns()
    assert client.get(path, headers={"Accept-Encoding": "gzip"}).status_code == 200
    return time.thread_time_ns() - started

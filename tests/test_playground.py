"""The playground: a call of the dashboard's is a call like any, and its key is nobody's but the signed-in session's."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from abhiapi import accounts, gateway, keys, playground
from abhiapi.admission import Request
from abhiapi.db import Database, Tx
from abhiapi.errors import InvalidKey, KeyDisabled, KeyRevoked, Refused
from abhiapi.ids import key_text
from abhiapi.web.pages import answers
from abhiapi.web.pages.samples import samples
from tests.harness import Clock, Fal, Server
from tests.people import Person, new_user, visiting
from tests.scripted import House

RUN = "/dashboard/playground/run"
PAGE = "/dashboard/playground"
MARKUP = "<script>alert(1)</script>\"'{{7*7}}"


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.started(tmp_path_factory.mktemp("play"), fal.url, ABHIAPI_TRUSTED_PROXIES="1") as running:
        yield running


class Player:
    """A customer at the playground."""

    def __init__(self, server: Server, credits: int = 100) -> None:
        self.server = server
        self.name, self.key = server.books.account(credits)
        self.person: Person = visiting(server, new_user(server, self.name))

    def number(self) -> str:
        return re.findall(r'name="run" value="([^"]+)"', self.person.get(PAGE).text)[0]

    def run(self, prompt: str = "a cat", more: str = "{}", **fields: str) -> requests.Response:
        form = {"model": "fal-ai/flux/dev", "prompt": prompt, "more": more, "do": "run"} | fields
        form.setdefault("run", self.number())
        return self.person.post(RUN, form)

    def calls(self) -> list[str]:
        return [call.state for call in self.server.books.calls(self.name)]

    def own_key(self) -> keys.Key:
        def read(tx: Tx) -> keys.Key:
            account = accounts.find(tx, self.name)
            assert account is not None
            found = playground.find(tx, account.account_id)
            assert found is not None
            return found

        return self.server.books.read(read)

    def change_key(self, status: str) -> None:
        key = self.own_key()
        self.server.books.write(lambda tx: keys.set_status(tx, key, status))


@pytest.fixture
def player(server: Server) -> Player:
    return Player(server)


def shown(response: requests.Response) -> str:
    return html.unescape(response.text)


# --- the key that nobody knows ------------------------------------------------------------------------------------


@pytest.mark.engines
def test_the_key_is_one_of_the_account_and_made_once(database: Database, clock: Clock) -> None:
    account_id = database.write(lambda tx: accounts.create(tx, "acme", now_ms=1)).account_id
    made = database.write(lambda tx: playground.ensured(tx, account_id, now_ms=clock()))
    again = database.write(lambda tx: playground.ensured(tx, account_id, now_ms=clock()))
    assert made == again
    assert database.read(lambda tx: keys.listed(tx, account_id)) == [made]
    caller = database.read(lambda tx: keys.authenticate_inside(tx, account_id, now_ms=clock()))
    assert (caller.key_id, caller.account) == (made.key_id, "acme")


@pytest.mark.engines
def test_no_account_calls_inside_without_its_own_playground_key(database: Database, clock: Clock) -> None:
    """An ordinary key is not enough, and neither is another account's playground."""
    ids = [database.write(lambda tx, name=name: accounts.create(tx, name, now_ms=1)).account_id for name in ("a", "b")]
    database.write(lambda tx: playground.ensured(tx, ids[0], now_ms=clock()))
    database.write(lambda tx: keys.create(tx, ids[1], name="playground", expires_at=None, now_ms=clock()))
    with pytest.raises(InvalidKey):
        database.read(lambda tx: keys.authenticate_inside(tx, ids[1], now_ms=clock()))


@pytest.mark.engines
def test_a_stopped_key_stays_stopped_and_a_revoked_one_is_replaced_when_asked(database: Database, clock: Clock) -> None:
    account_id = database.write(lambda tx: accounts.create(tx, "acme", now_ms=1)).account_id
    first = database.write(lambda tx: playground.ensured(tx, account_id, now_ms=clock()))
    database.write(lambda tx: keys.set_status(tx, first, "disabled"))
    with pytest.raises(KeyDisabled):
        database.read(lambda tx: keys.authenticate_inside(tx, account_id, now_ms=clock()))
    with pytest.raises(Refused):
        database.write(lambda tx: playground.renewed(tx, account_id, now_ms=clock()))
    database.write(lambda tx: keys.set_status(tx, first, "revoked"))
    with pytest.raises(KeyRevoked):
        database.read(lambda tx: keys.authenticate_inside(tx, account_id, now_ms=clock()))
    second = database.write(lambda tx: playground.renewed(tx, account_id, now_ms=clock()))
    assert second.key_id != first.key_id
    assert database.write(lambda tx: playground.renewed(tx, account_id, now_ms=clock())) == second
    caller = database.read(lambda tx: keys.authenticate_inside(tx, account_id, now_ms=clock()))
    assert caller.key_id == second.key_id


def test_the_key_is_never_made_an_ordinary_one(server: Server, player: Player) -> None:
    """Rotating would give away a key in its place: neither the library nor a page does it, and none offers to."""
    player.run()
    key = player.own_key()
    with pytest.raises(Refused, match="the playground's own"):
        server.books.write(lambda tx: keys.rotate(tx, key, grace_ms=0, now_ms=server.books.clock()))
    path = f"/dashboard/keys/{key_text(key.key_id)}"
    for told in (player.person.get(f"{path}/rotate"), player.person.post(f"{path}/rotate", {"grace": "0"})):
        assert told.status_code == 409
        assert "sk-fal-" not in told.text
    listed = player.person.get("/dashboard/keys").text
    assert f"{path}/rotate" not in listed
    assert f"{path}/disable" in listed
    assert player.own_key() == key


@pytest.mark.engines
def test_a_request_made_inside_reads_no_key_from_headers(house: House) -> None:
    """Whatever they hold, the account is the one that the process names."""
    other, other_key = house.books.account(1000)
    request = Request("POST", "/fal-ai/flux/dev", "", {"x-api-key": other_key}, lambda: None, inside_account_id=1)  # type: ignore[arg-type,return-value]
    reply = gateway.run(house.rt, request)
    assert reply.status == 401
    assert house.books.calls(other) == []


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_a_call_like_any(server: Server, player: Player, fal: Fal) -> None:
    """Held, forwarded with the prompt, charged once, shown with its picture, listed under its own key."""
    page = shown(player.run("a zebra at the opera", '{"image_size": "landscape_4_3", "seed": 1.50}'))
    (picture,) = re.findall(r'<img class="media" src="([^"]+)"', page)
    assert requests.get(picture, timeout=10).headers["content-type"] == "image/png"
    assert '"credits_used": 26.25' in page
    assert '"balance_remaining": 73.75' in page
    assert server.books.standing(player.name) == (73_750, 0)
    (call,) = server.books.calls(player.name)
    assert (call.state, call.mode, call.key_id) == ("settled", "sync", player.own_key().key_id)
    (seen,) = fal.calls("a zebra at the opera")
    assert '"seed": 1.50' in str(seen)
    assert "playground" in player.person.get("/dashboard/keys").text
    assert [entry.kind for entry in server.books.entries(player.name)] == ["charge", "topup"]


def test_a_form_that_is_sent_twice_is_charged_once(server: Server, player: Player) -> None:
    """A reload, a second click; but going back and changing the prompt is another call."""
    number = player.number()
    first, second = (player.run("twice", run=number) for _ in range(2))
    assert "sent a second time" not in first.text
    assert "sent a second time" in second.text
    assert server.books.standing(player.name) == (73_750, 0)
    assert player.run("another", run=number).status_code == 200
    assert server.books.standing(player.name) == (47_500, 0)


def test_an_estimate_costs_nothing_and_says_how_it_came_about(server: Server, player: Player) -> None:
    page = shown(player.run("a cat", '{"num_images": 3}', do="estimate"))
    assert "3 images of up to 1 MP" in page
    assert "78.75" in page
    form = {"model": "fal-ai/flux/dev", "prompt": "x", "more": '{"num_images": 2}', "run": player.number()}
    said = player.person.post("/dashboard/playground/estimate", form).json()
    assert said["credits"] == "52.5"
    assert '"num_images": 2' in said["samples"]["Python"]
    assert player.calls() == []


def test_what_a_call_is_refused_for_is_said(server: Server) -> None:
    """No credit; fal's own refusal; a suspended account; a stopped key."""
    poor = Player(server, credits=1)
    page = shown(poor.run())
    assert "insufficient_credits" in page
    assert "26.25" in page
    assert poor.calls() == []
    player = Player(server, 1000)
    assert "fal refused this call" in player.run("x", '{"num_images": 0}').text
    assert server.books.standing(player.name)[1] == 0
    player.run()
    player.change_key("disabled")
    assert "key_disabled" in player.run().text
    player.change_key("revoked")
    assert "key_revoked" in player.run().text
    assert player.person.post("/dashboard/playground/key").status_code == 303
    assert "credits_used" in player.run("once more").text
    account = server.books.read(lambda tx: accounts.find(tx, player.name))
    assert account is not None
    server.books.write(lambda tx: accounts.set_status(tx, account.account_id, "suspended"))
    before = len(player.calls())
    assert player.run("suspended").status_code == 403
    assert player.person.post("/dashboard/playground/key").status_code == 403
    looking = player.person.get(PAGE)
    assert looking.status_code == 200
    assert 'value="run"' not in looking.text
    assert len(player.calls()) == before


def test_limits_hold_for_the_playground(fal: Fal, tmp_path: Path) -> None:
    """As many calls in a minute as any key of the plan, and no more."""
    settings = {"ABHIAPI_TRUSTED_PROXIES": "1", "ABHIAPI_RATE_PER_MINUTE": "2"}
    with Server.started(tmp_path, fal.url, **settings) as server:
        player = Player(server, 1000)
        pages = [player.run(f"number {number}").text for number in range(3)]
    assert ["rate_limited" in page for page in pages] == [False, False, True]


@pytest.mark.parametrize(
    "more", ["{", "[1]", '{"a": NaN}', '"x"', '{"a": "\\ud800"}', "[" * 5000, '{"a":' * 600 + "1" + "}" * 600]
)
def test_parameters_that_cannot_be_read_are_said_and_nothing_runs(player: Player, more: str) -> None:
    response = player.run("x", more)
    assert response.status_code == 422
    assert "cannot be read" in response.text
    assert player.calls() == []


def test_a_form_without_a_token_or_a_number_runs_nothing(player: Player) -> None:
    form = {"model": "fal-ai/flux/dev", "prompt": "x", "more": "", "do": "run", "run": player.number()}
    assert player.person.post_bare(RUN, form).status_code == 400
    assert player.run(run="x" * 300).status_code == 400
    assert player.run(model="fal-ai/no-such-model").status_code == 404
    assert player.calls() == []


def test_markup_in_prompts_parameters_and_models_stays_text(player: Player) -> None:
    response = player.run(MARKUP, '{"x": "</code><script>alert(2)</script>"}')
    assert response.status_code == 200
    assert "<script>alert" not in response.text
    assert "<script>alert" not in player.person.get(PAGE, params={"model": MARKUP}).text


def test_pictures_may_come_from_fal_and_the_simulator_and_nowhere_else(player: Player, fal: Fal) -> None:
    policy = player.run().headers["Content-Security-Policy"]
    wanted = f"'self' https://*.fal.media {fal.url}"
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules["img-src"], rules["media-src"]) == (wanted, wanted)
    assert rules["script-src"] == rules["connect-src"] == "'self'"
    assert "fal.media" not in player.person.get("/dashboard/keys").headers["Content-Security-Policy"]


def test_a_model_is_found_by_parts_of_its_name(player: Player) -> None:
    found = player.person.get(PAGE, params={"model": "flux schnell"})
    assert found.status_code == 404
    assert '<a href="/dashboard/playground?model=fal-ai/flux/schnell">' in found.text
    assert '<option value="fal-ai/flux/schnell">' in player.person.get(PAGE).text


def test_no_real_key_is_on_the_page(server: Server, player: Player) -> None:
    text = player.run().text
    assert "sk-fal-your-key" in text
    assert re.findall(r"sk-fal-[0-9A-Za-z]{32}", text) == []


# --- what is shown --------------------------------------------------------------------------------------------------

RUN_URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"images": [{"url": "https://v3.fal.media/a.png", "width": 2, "height": 3}]}, [("image", True)]),
        ({"video": {"url": "https://fal.media/a.mp4"}}, [("video", False)]),
        ({"video": {"url": "https://v3b.fal.media/a", "content_type": "video/mp4"}}, [("video", True)]),
        ({"audio": {"url": "http://127.0.0.1:9/a.wav"}}, [("audio", True)]),
        ({"audio": {"url": "http://127.0.0.1:99/a.wav"}}, [("audio", False)]),
        ({"image": {"url": "https://v3.fal.media.example.com/a.png"}}, [("image", False)]),
        ({"image": {"url": "https://user@v3.fal.media/a.png"}}, [("image", False)]),
        ({"image": {"url": "http://v3.fal.media/a.png"}}, [("image", False)]),
        ({"image": {"url": "javascript:alert(1)"}}, []),
        ({"image": {"url": "data:image/png;base64,AAAA"}}, []),
        ({"image": {"url": "https://[::1"}}, []),
        ({"image": {"url": 7}}, []),
        ({"model_mesh": {"url": "https://v3.fal.media/a.obj"}}, [("file", True)]),
        (None, []),
        ({"a": {"b": [[{"c": {"url": "https://v3.fal.media/x.webp"}}]]}}, [("image", True)]),
    ],
)
def test_media_are_found_and_shown_only_from_hosts_that_are_allowed(
    answer: object, expected: list[tuple[str, bool]]
) -> None:
    assert [(one.kind, one.is_shown) for one in answers.media(answer, RUN_URL)] == expected


def test_the_simulator_is_only_one_on_this_machine() -> None:
    assert answers.picture_sources("https://fal.run") == answers.FALS_HOSTS
    assert answers.picture_sources("http://fal.example.com") == answers.FALS_HOSTS
    assert answers.picture_sources("http://127.0.0.1:8001/x") == f"{answers.FALS_HOSTS} http://127.0.0.1:8001"


ODD = {"prompt": 'it\'s "odd"\\ \n $HOME `ls` 😀 \u2028', "n": [1, True, None, {"a": {}}], "image_size": "square"}


def test_the_samples_make_the_very_call(server: Server, player: Player, fal: Fal) -> None:
    """curl and Python as they are printed, with a real key in the place of the made-up one."""
    made = {sample.language: sample.text for sample in samples(server.url, "fal-ai/flux/schnell", ODD)}
    for language, command in (("curl", ["sh", "-c"]), ("Python", [sys.executable, "-c"])):
        text = made[language].replace("sk-fal-your-key", player.key)
        done = subprocess.run([*command, text], capture_output=True, text=True, timeout=60)
        assert "credits_used" in done.stdout, (language, done)
    sent = [call for call in fal.calls("$HOME `ls`") if "flux/schnell" in str(call)]
    assert len(sent) == 2
    assert "JSON.stringify" in made["JavaScript"]

"""Webhooks as values: the wish in a query, URLs and addresses that may be called, payloads, keys and retries."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from abhiapi import addresses, signing, webhookwire
from abhiapi.errors import SettingsError, WebhookUrlRefused
from tests.harness import each_in_a_process


@pytest.mark.parametrize(
    ("query", "rest", "wish"),
    [
        ("", "", None),
        ("a=1&x=fal_webhook", "a=1&x=fal_webhook", None),
        ("fal_webhook=https%3A%2F%2Fx.example%2Fh%3Fa%3D1%2B2", "", "https://x.example/h?a=1+2"),
        ("a=1&fal%5Fwebhook=https://x.example&b=%20", "a=1&b=%20", "https://x.example"),
        ("FAL_WEBHOOK=http://x.example", "", "http://x.example"),
        ("fal_webhook", "", ""),
    ],
)
def test_the_wish_is_taken_out_however_it_is_spelt(query: str, rest: str, wish: str | None) -> None:
    """Row 46 of B5: fal never hears of the customer's URL."""
    assert webhookwire.take_wish(query) == (rest, wish)


def test_two_wishes_are_refused() -> None:
    with pytest.raises(WebhookUrlRefused):
        webhookwire.take_wish("fal_webhook=https://a.example&fal_webhook=https://b.example")


@pytest.mark.parametrize(
    "query", ["a=1;fal_webhook=https://x.example", "+fal_webhook=https://x.example", "a=1;Fal%5Fwebhook="]
)
def test_what_another_reader_might_take_for_the_wish_is_refused(query: str) -> None:
    """fal would deliver past us, to somebody who then knows the operator's user id there."""
    with pytest.raises(WebhookUrlRefused, match="of its own"):
        webhookwire.take_wish(query)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x.example/hook",
        "ftp://x.example/",
        "file:///etc/passwd",
        "https://",
        "https:///path",
        "https://user@x.example/",
        "https://user:pw@x.example/",
        "https://x.example:99999/",
        "https://x.example:0/",
        "https://x.example:port/",
        "https://x.example\\@evil.example/",
        "https://x.example/a b",
        "https://x.example/\r\nHost: evil",
        "https://bücher.example/",
        "https://-x.example/",
        "https://x.example/" + "a" * 2048,
        "https://[::1/",
    ],
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(WebhookUrlRefused):
        webhookwire.target_of(url)


@pytest.mark.parametrize(
    ("url", "port", "path", "authority"),
    [
        ("https://x.example", 443, "/", "x.example"),
        ("http://X.example:80/h?a=1#part", 80, "/h?a=1", "x.example"),
        ("https://x.example:8443/h", 8443, "/h", "x.example:8443"),
        ("http://[2606:4700::1111]:81/?q", 81, "/?q", "[2606:4700::1111]:81"),
    ],
)
def test_a_url_is_taken_apart_once(url: str, port: int, path: str, authority: str) -> None:
    target = webhookwire.target_of(url)
    assert (target.port, target.path, target.authority) == (port, path, authority)


REFUSED = """
0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.9.9.9 168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.255 240.0.0.1
255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1 2001:0:a00:1::f5ff:fffe 2001:db8::1 2002:7f00:1:: 2002:a00:1::1
2002:a9fe:a9fe:: 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 localhost 127.1 0x7f000001
""".split()
ALLOWED = """
1.1.1.1 8.8.8.8 93.184.216.34 172.32.0.1 100.128.0.1 169.253.1.1 2606:4700:4700::1111 2a00:1450:4001::200e
::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
""".split()


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    """Row 67 of B9."""
    assert not addresses.is_allowed(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_a_public_address_is_allowed(address: str) -> None:
    assert addresses.is_allowed(address)


def test_the_setting_opens_loopback_and_nothing_else() -> None:
    opened = {address for address in REFUSED if addresses.is_allowed(address, with_loopback=True)}
    assert opened == {"127.0.0.1", "127.9.9.9", "::1"}


def test_a_payload_holds_the_results_bytes_as_they_are() -> None:
    body = rb'{"a": 1.0, "b":"\u00e9", "c": 1E400}'
    made = webhookwire.payload("R", "G", 200, body)
    assert made == b'{"request_id": "R", "gateway_request_id": "G", "status": "OK", "payload": ' + body + b"}"
    failed = json.loads(webhookwire.payload("R", "R", 422, b'{"detail": []}'))
    assert failed == {
        "request_id": "R", "gateway_request_id": "R", "status": "ERROR", "error": "Invalid status code: 422",
        "payload": {"detail": []},
    }  # fmt: skip


@pytest.mark.parametrize("body", [None, b"", b"\xff\xd8 a picture", b"<html>", b"{"])
def test_what_is_no_json_or_too_large_is_said_in_words(body: bytes | None) -> None:
    told = json.loads(webhookwire.payload("R", "R", 200, body))
    assert told["payload"] is None
    assert "fetch the result" in told["payload_error"]


def test_retries_grow_and_last_for_about_a_day() -> None:
    spread = [webhookwire.backoff_ms(3, chance) for chance in range(webhookwire.CHANCE_MAX)]
    assert (min(spread), max(spread)) == (32_000, 47_960)
    plain = [webhookwire.backoff_ms(attempts, 500) for attempts in range(1, webhookwire.ATTEMPTS_MAX)]
    assert plain == sorted(plain)
    assert plain[0] == 10_000
    assert 20 * 3_600_000 < sum(plain) < 28 * 3_600_000


def test_a_name_that_no_header_can_carry_is_encoded() -> None:
    assert webhookwire.user_id("acme 2") == "acme 2"
    assert webhookwire.user_id("bücher\n%") == "b%C3%BCcher%0A%25"


def test_our_page_of_keys_is_read_back() -> None:
    key = signing.WebhookKey.new()
    assert signing.public_keys(key.jwks()) == [key.public]
    signature = key.sign(b"four lines")
    assert signing.is_signed_by(key.public, signature, b"four lines")
    assert not signing.is_signed_by(key.public, signature, b"four Lines")
    assert not signing.is_signed_by(signing.WebhookKey.new().public, signature, b"four lines")


@pytest.mark.parametrize("page", [None, [], {}, {"keys": 1}, {"keys": [1, {}, {"x": 7}, {"x": "*"}, {"x": "AAAA"}]}])
def test_a_page_without_keys_gives_none(page: object) -> None:
    assert signing.public_keys(page) == []


def test_tokens_are_of_one_key_and_one_call() -> None:
    secret = bytes(range(32))
    key = signing.WebhookKey(secret)
    token = key.token("call_a")
    assert signing.WebhookKey(secret).is_token("call_a", token)
    assert not key.is_token("call_b", token)
    assert not signing.WebhookKey.new().is_token("call_a", token)
    assert not key.is_token("call_a", "é")


def _public(path: str) -> bytes:
    return signing.load(None, Path(path)).public


def test_processes_that_start_at_once_have_one_key(tmp_path: Path) -> None:
    kept = tmp_path / "abhiapi.db.webhook-key"
    found = set(each_in_a_process(_public, [(str(kept),)] * 8))
    assert len(found) == 1
    (file,) = tmp_path.iterdir()
    assert file.name == "abhiapi.db.webhook-key"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_file_that_holds_no_key_is_said_and_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "abhiapi.db.webhook-key"
    file.write_text("c2hvcnQgc2VjcmV0\n")
    with pytest.raises(SettingsError, match="webhook-key") as refusal:
        signing.load(None, file)
    assert "c2hvcnQ" not in str(refusal.value)
    assert file.read_text() == "c2hvcnQgc2VjcmV0\n"
    assert signing.load(bytes(32), file).public == signing.WebhookKey(bytes(32)).public
    file.write_text(base64.b64encode(bytes(32)).decode())
    assert signing.load(None, file).public == signing.WebhookKey(bytes(32)).public

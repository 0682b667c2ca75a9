"""What `x-fal-target-url` may name: nothing that any reader of URLs would take for another host or another path."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from abhiapi import target
from abhiapi.errors import ForbiddenTarget, UnknownRoute
from abhiapi.target import Target

HOSTS = {"run": "fal.run", "queue": "queue.fal.run", "upload": "rest.fal.ai"}
UPLOAD = "/storage/upload/initiate?storage_type=fal-cdn-v3"
JOB = "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"

SERVED = {
    "https://fal.run/fal-ai/flux/dev": Target("run", "/fal-ai/flux/dev", ""),
    "https://fal.run/fal-ai/flux/dev?a=1&b=..%2f&c=https://x": Target(
        "run", "/fal-ai/flux/dev", "a=1&b=..%2f&c=https://x"
    ),
    "https://fal.run/fal-ai/flux/dev/stream": Target("run", "/fal-ai/flux/dev/stream", ""),
    "https://fal.run/v1/account": Target("run", "/v1/account", ""),
    "https://fal.run/queue/x": Target("run", "/queue/x", ""),
    f"https://fal.run/fal-ai/queue/requests/{JOB}": Target("queue", f"/fal-ai/queue/requests/{JOB}", ""),
    "https://queue.fal.run/fal-ai/flux/dev?": Target("queue", "/queue/fal-ai/flux/dev", ""),
    f"https://queue.fal.run/fal-ai/flux/requests/{JOB}/status?logs=1": Target(
        "queue", f"/queue/fal-ai/flux/requests/{JOB}/status", "logs=1"
    ),
    f"https://rest.fal.ai{UPLOAD}": Target("upload", *UPLOAD.split("?")),
    f"https://rest.fal.ai{UPLOAD.replace('initiate', 'initiate-multipart')}": Target(
        "upload", "/storage/upload/initiate-multipart", "storage_type=fal-cdn-v3"
    ),
    f"https://rest.fal.ai{UPLOAD.replace('initiate', 'complete-multipart')}": Target(
        "upload", "/storage/upload/complete-multipart", "storage_type=fal-cdn-v3"
    ),
}

ATTACKS = (
    # another host, dressed up
    "https://fal.run.evil/x", "https://fal.run.evil.example/x", "https://notfal.run/x", "https://xfal.run/x",
    "https://evil.fal.run/x", "https://fal.run@evil.example/x", "https://fal.run:pass@evil.example/x",
    "https://evil.example/https://fal.run/x", "https://evil.example/fal.run/x", "https://evil.example?https://fal.run/x",
    "https://evil.example#https://fal.run/x", "https://evil.example\\@fal.run/x", "https://fal.run\\@evil.example/x",
    "https://fal.run\\.evil.example/x", "https://fal.run%2eevil.example/x", "https://fal.run%00.evil.example/x",
    "https://fal.run%2f.evil.example/x", "https://fal.run;.evil.example/x", "https://fal.run,evil.example/x",
    "https://[fal.run]/x", "https://[::1]/x", "https://127.0.0.1/x", "https://2130706433/x", "https://localhost/x",
    "https://169.254.169.254/latest/meta-data", "https://falrun.com/x", "https://v3.fal.media/files/upload",
    "https://rest.alpha.fal.ai/storage/upload/initiate", "https://ws.fal.run/x", "https://auth.fal.ai/x",
    # the host in other letters
    "https://fal.run./x", "https://.fal.run/x", "https://FAL.RUN/x", "https://fal.Run/x", "https://queue.fal.run./x",
    "https://f\u0430l.run/x", "https://fal\u3002run/x", "https://fal.r\u00fcn/x", "https://xn--fl-7ka.run/x",
    "https://fal%2erun/x", "https://\uff46al.run/x", "https://fal.run\u200b/x",
    # userinfo and ports
    "https://user@fal.run/x", "https://user:pass@fal.run/x", "https://@fal.run/x", "https://:@fal.run/x",
    "https://fal.run:443/x", "https://fal.run:/x", "https://fal.run:80/x", "https://fal.run:8443/x",
    "https://queue.fal.run:443/x", "https://rest.fal.ai:443" + UPLOAD,
    # another scheme
    "http://fal.run/x", "HTTPS://fal.run/x", "Https://fal.run/x", "HTTPS://FAL.RUN/x", "wss://fal.run/x",
    "ws://fal.run/x", "ftp://fal.run/x", "file:///etc/passwd", "//fal.run/x", "///fal.run/x", "https:/fal.run/x",
    "https:fal.run/x", "https:///fal.run/x", "https:////fal.run/x", "https://///fal.run/x", "https:\\\\fal.run\\x",
    "https:/\\fal.run/x", "javascript:https://fal.run/x", "url:https://fal.run/x", "fal.run/x", "/x", "x", "",
    # a path that leaves, or means something else elsewhere
    "https://fal.run", "https://fal.run?x", "https://fal.run#x", "https://fal.run//x", "https://fal.run/x//y",
    "https://fal.run//evil.example/x", "https://fal.run/..", "https://fal.run/../x", "https://fal.run/x/../y",
    "https://fal.run/x/..", "https://fal.run/x/./y", "https://fal.run/x/%2e%2e/y", "https://fal.run/x/%2E%2e/y",
    "https://fal.run/x/.%2e/y", "https://fal.run/..%2fx", "https://fal.run/x%2fy", "https://fal.run/x%2Fy",
    "https://fal.run/x%252fy", "https://fal.run/x%5cy", "https://fal.run/x\\y", "https://fal.run/x%255cy",
    "https://fal.run/x%00y", "https://fal.run/x%0ay", "https://fal.run/x@y", "https://fal.run/x%40y",
    "https://fal.run/x%3fy", "https://fal.run/x%23y", "https://fal.run/x#y", "https://fal.run/x?y#z",
    "https://fal.run/x%2525252525252fy", "https://queue.fal.run//x", "https://queue.fal.run/../x",
    "https://rest.fal.ai/tokens/../storage/upload/initiate?storage_type=fal-cdn-v3",
    "https://rest.fal.ai/storage/upload/initiate/../../auth/token?storage_type=fal-cdn-v3",
    "https://rest.fal.ai//storage/upload/initiate?storage_type=fal-cdn-v3",
    "https://rest.fal.ai/storage/upload/initiate%2f..%2f..%2fauth%2ftoken?storage_type=fal-cdn-v3",
    # blanks, control characters, and what is no ASCII
    " https://fal.run/x", "https://fal.run/x ", "https://fal.run /x", "https://fal.run/x y", "https://fal.run/x\ty",
    "https://fal.run\t/x", "ht\ttps://fal.run/x", "https://fal.run/x\n", "https://fal.run/x\r\nx-evil: 1",
    "https://fal.run/x\x00", "https://fal.run/x\x7f", "https://fal.run/x\xa0", "https://fal.run/\u00e4",
    "https://fal.run/x?\u00e4", "https://fal.run/x?a b", "https://fal.run/x?a\r\nb", "https://fal.run/x?a\\b",
    "https://fal.run/x?\"", "https://fal.run/<x>",
    # two addresses, as servers join two headers into one
    "https://fal.run/x,https://fal.run/y", "https://fal.run/x, https://evil.example/y", "https://fal.run/x?a,b",
    "https://fal.run/x?a=1,https://fal.run/y", ",https://fal.run/x", "https://fal.run/x,",
    # uploads of another kind
    "https://rest.fal.ai/storage/upload/initiate", "https://rest.fal.ai/storage/upload/initiate?storage_type=gcs",
    f"https://rest.fal.ai{UPLOAD}&x=1", f"https://rest.fal.ai{UPLOAD}&storage_type=gcs",
    "https://rest.fal.ai/storage/upload/initiate?x=1&storage_type=fal-cdn-v3", f"https://fal.ai{UPLOAD}",
)  # fmt: skip

NOT_SERVED = (
    "https://rest.fal.ai/tokens/", "https://rest.fal.ai/tokens/realtime", "https://rest.fal.ai/tokens",
    "https://rest.fal.ai/storage/auth/token?storage_type=fal-cdn-v3", "https://rest.fal.ai/storage/auth/token",
    "https://rest.fal.ai/storage/upload/initiate/?storage_type=fal-cdn-v3", "https://rest.fal.ai/",
    "https://rest.fal.ai/storage/upload/initiate-multipart-2?storage_type=fal-cdn-v3",
    "https://rest.fal.ai/storage/upload/Initiate?storage_type=fal-cdn-v3", "https://rest.fal.ai/fal-ai/flux/dev",
    "https://rest.fal.ai/.well-known/jwks.json", "https://api.fal.ai/v1/models", "https://api.fal.ai/v1/keys",
    "https://api.fal.ai/v1/account/billing?expand=credits", "https://api.fal.ai/",
)  # fmt: skip


@pytest.mark.parametrize("address", SERVED)
def test_an_address_of_fals_is_the_route_of_ours_that_stands_for_it(address: str) -> None:
    assert target.parse(address) == SERVED[address]


@pytest.mark.parametrize("address", ATTACKS)
def test_what_is_no_address_of_fals_is_forbidden(address: str) -> None:
    """failures.md row 61: the operator's key goes to a constant host, whatever a caller writes."""
    with pytest.raises(ForbiddenTarget):
        target.parse(address)


@pytest.mark.parametrize("address", NOT_SERVED)
def test_what_mints_or_reads_in_the_operators_account_does_not_exist_here(address: str) -> None:
    """failures.md row 64."""
    with pytest.raises(UnknownRoute):
        target.parse(address)


def test_the_header_has_to_be_there() -> None:
    with pytest.raises(ForbiddenTarget, match="x-fal-target-url"):
        target.parse(None)


@pytest.mark.parametrize("address", ["https://sk-fal-secret@evil.example/x", "https://fal.run/..?k=sk-fal-secret"])
def test_a_refusal_does_not_repeat_what_was_sent(address: str) -> None:
    with pytest.raises(ForbiddenTarget) as refusal:
        target.parse(address)
    assert "secret" not in refusal.value.message


PIECES = st.sampled_from(
    ["https://", "http://", "fal.run", "queue.", "rest.fal.ai", "api.fal.ai", "/", "//", "\\", "@", ":", ":443", "?",
     "#", ".", "..", "%2e", "%2f", "%5c", "%40", "evil.example", UPLOAD, "/fal-ai/flux/dev", ",", ";", "&", "=", "[",
     "]", "%", " ", "\t", "\n", "\x00", "\u3002", "x", "%00", "%25", "/fal-ai/queue/requests/"]
)  # fmt: skip
STARTS = st.sampled_from(["https://fal.run/", "https://queue.fal.run/", "https://rest.fal.ai/", "https://fal.run", ""])


@given(STARTS, st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join))
@example("https://fal.run/", "x;y=1?z")
def test_whatever_is_accepted_is_read_alike_by_every_reader_of_urls(start: str, rest: str) -> None:
    """failures.md row 61: two readers of URLs see the same host, path and query in it that we do."""
    address = start + rest
    try:
        wanted = target.parse(address)
    except (ForbiddenTarget, UnknownRoute):
        return
    path = wanted.path.removeprefix("/queue") if address.startswith("https://queue.") else wanted.path
    by_library = urlsplit(address)
    assert (by_library.scheme, by_library.netloc) == ("https", by_library.hostname)
    assert (by_library.path, by_library.query, by_library.fragment) == (path, wanted.query, "")
    if wanted.service != "queue" or not path.startswith("/fal-ai/queue/"):
        assert by_library.hostname == HOSTS[wanted.service]
    assert by_library.hostname in HOSTS.values()
    try:
        by_another = parse_url(address)
    except LocationParseError:
        return
    assert (by_another.scheme, by_another.auth, by_another.host, by_another.port) == (
        "https", None, by_library.hostname, None,
    )  # fmt: skip


@given(
    st.text(alphabet=st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='#,\\"<>'), max_size=40)
)
def test_a_query_passes_as_it_is(query: str) -> None:
    assert target.parse(f"https://fal.run/fal-ai/flux/dev?{query}") == Target("run", "/fal-ai/flux/dev", query)


@given(st.text(max_size=60))
def test_any_text_is_served_or_refused_and_nothing_else_happens(text: str) -> None:
    try:
        wanted = target.parse(text)
    except (ForbiddenTarget, UnknownRoute):
        return
    assert text.startswith("https://")
    assert text.endswith(wanted.uri.removeprefix("/queue"))

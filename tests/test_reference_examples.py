"""The examples on the reference pages, run as a customer pastes them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.harness import Books, Server, environment
from tests.test_queue_clients import Site, ran, site, tls_site
from tests.test_quickstart import COMMANDS, pasted
from tests.test_reference import SEED_HOST, page

__all__ = ["site", "tls_site"]  # fixtures


def with_key(block: str, key: str) -> str:
    return block.replace("sk-fal-your-key", key)


def test_the_quick_start_of_the_page_works(shared_server: Server, books: Books) -> None:
    """The three commands are the seed's, with this host, and run as they are pasted."""
    name, key = books.account(5000)
    commands = [block.text for block in page(shared_server).blocks if block.text.startswith("curl")]
    assert commands == [command.replace(SEED_HOST, shared_server.url).rstrip("\n") for command in COMMANDS.values()]
    for model, command in zip(COMMANDS, commands, strict=True):
        answer = json.loads(pasted(command, shared_server, key))
        assert answer["_billing"]["model"] == model
        assert answer["_billing"]["credits_used"] > 0
    assert len([entry for entry in books.entries(name) if entry.kind == "charge"]) == 3


def blocks(site: Site, path: str, language: str) -> list[str]:
    """The examples of a page as this customer pastes them."""
    said = page(site.server, path)
    return [with_key(block.text, site.key) for block in said.blocks if block.language == language]


def test_the_curl_lines_of_the_page_work(site: Site) -> None:
    """The page names the public address, whose certificate is the test's own."""
    job, stream = blocks(site, "/docs/clients", "bash")
    env = site.env(CURL_CA_BUNDLE=str(site.tls.authority_file))
    assert '"images"' in ran(["bash", "-euo", "pipefail", "-c", job], env)
    assert ran(["bash", "-euo", "pipefail", "-c", stream], env).startswith(": _billing {")
    assert site.charges() == 2


def test_the_python_lines_of_the_page_work(site: Site) -> None:
    """The two variables as the page shows them, and nothing else."""
    exports, whole, _without_tls, stream = blocks(site, "/docs/clients", "python")
    env = environment(SSL_CERT_FILE=str(site.tls.authority_file), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    env |= dict(re.findall(r"^# export (\w+)=(\S+)$", exports, re.MULTILINE))
    assert "26.25" in ran([sys.executable, "-c", whole], env)
    assert len(ran([sys.executable, "-c", stream], env).split()) == 4
    assert site.charges() == 2


def test_the_javascript_lines_of_the_pages_work(site: Site, node_folder: Path) -> None:
    """By a middleware, by proxyUrl, and through an OpenAPI client."""
    env = site.env(NODE_EXTRA_CA_CERTS=str(site.tls.authority_file))
    scripts = [blocks(site, path, "javascript")[0] for path in ("/docs/clients", "/docs/browser", "/docs/any-client")]
    for number, script in enumerate(scripts):
        (node_folder / f"reference-{number}.mjs").write_text(script)
        assert "26.25" in ran(["node", f"reference-{number}.mjs"], env, node_folder)
    assert site.charges() == 3

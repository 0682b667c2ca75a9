"""The pages of docs/ that customers read, as HTML: one text for readers of the files and of the site.

`texts/` holds links to the files in docs/, so that the installed package brings them along. Raw HTML in a text is
shown, never passed on. The address and the host that the texts use are replaced by those of this service.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup, escape
from pygments.lexers import get_lexer_by_name
from pygments.token import Token as TokenKind

FOLDER = Path(__file__).with_name("texts")
_COLOURED = frozenset(("bash", "javascript", "json", "python"))
_COLOURS = (
    (TokenKind.Comment, "c"),
    (TokenKind.Keyword, "k"),
    (TokenKind.Operator.Word, "k"),
    (TokenKind.String, "s"),
    (TokenKind.Number, "m"),
    (TokenKind.Name.Tag, "t"),
    (TokenKind.Name.Variable, "t"),
    (TokenKind.Name.Function, "t"),
)
EXAMPLE_URL, EXAMPLE_HOST = "https://fal.example.com", "fal.example.com"


@dataclass(frozen=True, slots=True)
class Heading:
    anchor: str
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A page: its title, its sections for the table of contents, its HTML without the title."""

    name: str
    title: str
    sections: tuple[Heading, ...]
    html: str

    def at(self, base_url: str) -> Markup:
        """The HTML with this service's address where the text has the example's."""
        html = self.html.replace(EXAMPLE_URL, str(escape(base_url)))
        parts = urlsplit(base_url)
        return Markup(html.replace(EXAMPLE_HOST, str(escape(parts.netloc + parts.path))))


def names() -> list[str]:
    """The pages there are."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


@lru_cache(maxsize=32)
def text(name: str) -> Text:
    """One of `names`, rendered once per process."""
    tokens = _parser().parse((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
    title, sections = name, []
    for heading, inline in _headings(tokens):
        words = _plain(inline)
        heading.attrSet("id", anchor(words))
        if heading.tag == "h1":
            title = words
        elif heading.tag == "h2":
            sections.append(Heading(anchor(words), words))
    body = tokens[3:] if tokens and tokens[0].tag == "h1" else tokens
    parser = _parser()
    return Text(name, title, tuple(sections), parser.renderer.render(body, parser.options, {}))


def anchor(words: str) -> str:
    """The id of a heading, as code hosts make it: the links in docs/ lead to the same place here and there."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


class _Renderer(RendererHTML):
    """What the pages' stylesheet and script want: code in figures, tables that scroll, links to our own pages."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: object) -> str:
        return code_html(tokens[idx].info.strip() or "text", tokens[idx].content)

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: object) -> str:
        return '<div class="table" tabindex="0" role="group" aria-label="Table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: object) -> str:
        return "</table></div>\n"

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: object) -> str:
        tokens[idx].attrSet("href", _target(str(tokens[idx].attrGet("href"))))
        return self.renderToken(tokens, idx, options, {})


@lru_cache(maxsize=256)
def code_html(language: str, content: str) -> str:
    """A block of code with its language, coloured; the script adds a button that copies it."""
    name = {"sh": "bash", "js": "javascript"}.get(language, language)
    return (
        f'<figure class="code" data-language="{escape(name)}"><figcaption>{escape(name)}</figcaption>'
        f'<pre tabindex="0"><code>{_coloured(name, content)}</code></pre></figure>\n'
    )


def _coloured(language: str, content: str) -> str:
    """The same characters, with spans of a few kinds; plain where the language is none of those in the pages."""
    if language not in _COLOURED:
        return str(escape(content))
    lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    pieces = []
    for token, value in lexer.get_tokens(content):
        kind = next((name for family, name in _COLOURS if token[: len(family)] == family), None)
        pieces.append(f'<span class="{kind}">{escape(value)}</span>' if kind else str(escape(value)))
    return "".join(pieces)


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")


def _headings(tokens: Sequence[Token]) -> Iterator[tuple[Token, Token]]:
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            yield token, tokens[number + 1]


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def _target(href: str) -> str:
    """Where a link of a text leads here: pages of ours by their address, everything else as it is."""
    match = re.fullmatch(r"([a-z-]+)\.md(#.*)?", href)
    return f"/docs/{match[1]}{match[2] or ''}" if match else href

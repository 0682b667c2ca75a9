"""What a page says, as a reader without a browser has it: its lines, its blocks of code, its links."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_BLOCKS = frozenset("h1 h2 h3 p tr li pre figcaption label summary".split())


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str


@dataclass
class Said:
    lines: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.said = Said()
        self._line = ""
        self._code: str | None = None
        self._language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert "style" not in given, "a style in a page, which its policy forbids"
        assert not [name for name in given if name.startswith("on")], "a script in a page, which its policy forbids"
        if tag in _BLOCKS:
            self._end_line()
        if tag == "figure":
            self._language = given["data-language"]
        if tag == "pre":
            self._code = ""
        if tag == "a":
            self.said.links.append(given["href"])
        if "id" in given:
            self.said.ids.append(given["id"])
        if tag in ("img", "script") or (tag == "link" and given["rel"] in ("stylesheet", "icon")):
            self.said.loaded.append(given.get("src") or given["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._end_line()
        if tag == "pre" and self._code is not None:
            self.said.blocks.append(Block(self._language, self._code))
            self.said.lines.extend(line.strip() for line in self._code.splitlines() if line.strip())
            self._code = None

    def handle_data(self, data: str) -> None:
        if self._code is not None:
            self._code += data
        else:
            self._line += data

    def _end_line(self) -> None:
        line = re.sub(r"\s+", " ", self._line).strip()
        if line:
            self.said.lines.append(line)
        self._line = ""


def read(html: str) -> Said:
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.said

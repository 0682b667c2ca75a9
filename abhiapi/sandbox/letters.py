"""Letters of 5 x 7 dots, for the words on placeholder pictures: ASCII from the blank to the underscore."""

from __future__ import annotations

from collections.abc import Iterator

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7

# Five columns a letter, one byte each, the lowest bit at the top. Small letters are drawn as capitals.
_FIRST = " "
_COLUMNS = bytes.fromhex(
    "0000000000" "00005f0000" "0007000700" "147f147f14" "242a7f2a12" "2313086462" "3649562050" "0008070300"
    "001c224100" "0041221c00" "2a1c7f1c2a" "08083e0808" "0000703000" "0808080808" "0000606000" "2010080402"
    "3e5149453e" "00427f4000" "7249494946" "2141494d33" "1814127f10" "2745454539" "3c4a494931" "4121110907"
    "3649494936" "464949291e" "0000140000" "0000341400" "0008142241" "1414141414" "4122140800" "0201590906"
    "3e415d594e" "7c1211127c" "7f49494936" "3e41414122" "7f4141413e" "7f49494941" "7f09090901" "3e41415173"
    "7f0808087f" "00417f4100" "2040413f01" "7f08142241" "7f40404040" "7f021c027f" "7f0408107f" "3e4141413e"
    "7f09090906" "3e4151215e" "7f09192946" "2649494932" "03017f0103" "3f4040403f" "1f2040201f" "3f4038403f"
    "6314081463" "0304780403" "6159494d43" "007f414100" "0204081020" "0041417f00" "0402010204" "4040404040"
)  # fmt: skip


def text_rows(text: str) -> Iterator[list[bool]]:
    """The dots of a line of text, a list for each of its 7 rows; what has no letter here becomes a question mark."""
    glyphs = [_glyph(character) for character in text.upper()]
    for row in range(GLYPH_HEIGHT):
        yield [bool(column >> row & 1) for glyph in glyphs for column in (*glyph, 0)]


def _glyph(character: str) -> bytes:
    at = (ord(character) - ord(_FIRST)) * GLYPH_WIDTH
    if not 0 <= at < len(_COLUMNS):
        return _glyph("?")
    return _COLUMNS[at : at + GLYPH_WIDTH]

"""Writes the generated parts of the docs: docs/cli.md and the table of docs/settings.md.

python tools/make_docs.py          write them
python tools/make_docs.py --check  exit 1 if they are not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abhiapi import settings
from abhiapi.commands import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 100


def commands(command: click.Command, path: tuple[str, ...] = ("abhiapi",)) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command of the tree with its help, parents first."""
    context = click.Context(command, info_name=" ".join(path), terminal_width=WIDTH, max_content_width=WIDTH)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], (*path, name))


def cli_page() -> str:
    parts = ["# The command line", "", "Made from the program's own `--help` by `python tools/make_docs.py`.", ""]
    for path, text in commands(main):
        parts += [f"## {' '.join(path)}", "", "```", text.rstrip(), "```", ""]
    return "\n".join(parts)


def settings_page() -> str:
    rows = [
        "# Settings",
        "",
        "Read from the environment once, when a process starts; a `.env` file in the working folder fills in what the",
        "environment leaves out. Every bad value is reported, all together, and the process exits with status 2.",
        "A secret, and the URLs of database and limits, may stand in a file that `NAME_FILE` names.",
        "Made by `python tools/make_docs.py`.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
    ]
    for variable in settings.variables():
        default = f"`{variable.default}`" if variable.default else "none"
        rows.append(f"| `{variable.name}` | {default} | {variable.meaning} |")
    return "\n".join([*rows, ""])


PAGES = {"cli.md": cli_page, "settings.md": settings_page}


def main_() -> int:
    stale = [name for name, page in PAGES.items() if not _is_fresh(DOCS / name, page())]
    if "--check" in sys.argv:
        for name in stale:
            print(f"docs/{name} is stale: run python tools/make_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(PAGES[name]())
    return 0


def _is_fresh(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main_())

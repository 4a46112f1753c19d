"""Configuration reference: every command, config group, option and key of conf/, with its default and its comment.

Renders the files that ``gptlab.config.reference`` reads as Markdown. Used by the site's build and tests/test_docs.py.
The generated pages are not committed.
"""

import html
import re
from pathlib import Path

from gptlab.config.reference import ConfigFile, comments, meaning, read_configuration

ROOT = Path(__file__).parents[2]


def render_pages(conf: Path) -> dict[str, str]:
    """Renders an index, a page for the commands and a page per config group; returns Markdown by file name."""
    files = read_configuration(conf)
    known = comments(files)
    groups: dict[str, list[ConfigFile]] = {}
    for file in files:
        groups.setdefault(file.group, []).append(file)
    pages = {"index.md": _index(groups)}
    for group, members in groups.items():
        title = f"Config group `{group}`" if group else "Commands"
        body = [f"# {title}\n", *(_render(file, known) for file in members)]
        pages[page_name(group)] = "\n".join(body)
    return pages


def page_name(group: str) -> str:
    """Returns the page of a config group; the group "" stands for the commands."""
    return f"{group.replace('/', '-') or 'commands'}.md"


def anchor(file: str) -> str:
    """Returns the anchor of a configuration file on its page."""
    return re.sub(r"[^a-z0-9_-]+", "-", file.lower())


def _index(groups: dict[str, list[ConfigFile]]) -> str:
    lines = [
        "# Configuration reference\n",
        "Every config group and option of `conf/`, generated from its files. Commands accept `group=option` and",
        "`key=value`. `???` marks a value that must be set.\n",
        "| group | options |",
        "|---|---|",
    ]
    for group, members in groups.items():
        links = ", ".join(f"[{file.option}]({page_name(group)}#{anchor(file.name)})" for file in members)
        lines.append(f"| [{group or 'commands'}]({page_name(group)}) | {links} |")
    return "\n".join(lines) + "\n"


def _render(file: ConfigFile, known: dict[str, str]) -> str:
    title = f"{file.group}={file.option}" if file.group else f"gptlab.{file.option}"
    lines = [f"## `{title}` {{ #{anchor(file.name)} }}\n", f"{_escape(file.summary)}\n", f"`conf/{file.name}.yaml`\n"]
    if file.defaults:
        lines.append(f"Defaults list: {', '.join(f'`{entry}`' for entry in file.defaults)}\n")
    if file.keys:
        lines += ["| key | default | meaning |", "|---|---|---|"]
    for key in file.keys:
        if key.heading:
            lines.append(f"| | | **{_escape(key.heading)}** |")
        lines.append(f"| `{key.name}` | {_code(key.default)} | {_escape(meaning(key, known))} |")
    return "\n".join(lines) + "\n"


def _code(value: str) -> str:
    """Returns a value as inline code in a table cell."""
    return f"<code>{_escape(value)}</code>" if value else ""


def _escape(text: str) -> str:
    """Escapes text for a Markdown table cell; keeps inline code."""
    parts = html.escape(text, quote=False).split("`")
    plain = [re.sub(r"[\\*_{}\[\]|]", lambda found: f"&#{ord(found[0])};", part) for part in parts]
    even = len(parts) % 2 == 1
    return "".join(f"<code>{part}</code>" if even and n % 2 else part for n, part in enumerate(plain))

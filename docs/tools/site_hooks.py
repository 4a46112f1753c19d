"""MkDocs hooks: generated pages, links to files of the repository, and images for light and dark mode.

- README.md becomes the home page and CONTRIBUTING.md a page. ``reference/`` is generated from conf/.
- A link to another file or directory of the repository points to a generated page that shows the file or lists the
  directory. If the target does not exist, MkDocs prints a warning, which is an error with ``--strict``.
- A ``<picture>`` element with a source for prefers-color-scheme: dark, which GitHub supports, becomes two images. The
  site shows the one for the current mode.
"""

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
from config_reference import ROOT, anchor, page_name, render_pages

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # files in the repository root
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\s\"#]*)(#[^)\s\"]*)?")
PICTURE = re.compile(
    r"<picture>\s*<source[^>]*?srcset=\"(?P<dark>[^\"]+)\"[^>]*>\s*"
    r"<img(?=[^>]*?src=\"(?P<light>[^\"]+)\")(?=[^>]*?alt=\"(?P<alt>[^\"]*)\")[^>]*>\s*</picture>"
)
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".sh": "bash", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Removes navigation entries whose pages do not exist, and appends pages that are not listed."""
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    there = written | {page for file, page in PAGES.items() if (ROOT / file).exists()}
    listed: set[str] = set()

    def keep(entries: list[Any]) -> list[Any]:
        kept: list[Any] = []
        for entry in entries:
            title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
            if isinstance(value, list):
                value = keep(value)
            elif value in there or value.startswith("reference/"):  # MkDocs reports one that is not generated
                listed.add(value)
            else:
                continue
            kept.append(value if title is None else {title: value})
        return kept

    config.nav = keep(config.nav or []) + sorted(there - listed)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and those from Markdown files in the repository root."""
    for file, page in PAGES.items():
        if (ROOT / file).exists():
            files.append(_generated(config, page, (ROOT / file).read_text(encoding="utf-8")))
    for name, text in render_pages(ROOT / "conf").items():
        files.append(_generated(config, f"reference/{name}", text, in_nav=name == "index.md"))
    for page in [file for file in files.documentation_pages() if not file.src_uri.startswith("reference/")]:
        for target in _repository_files(page):
            if (name := _source_page(target)) not in files.src_uris:
                files.append(_generated(config, name, _show_file(target), in_nav=False))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Converts links that are relative to the Markdown file, as on GitHub, to links within the site."""
    if page.file.src_uri.startswith(("reference/", "source/")):
        return markdown

    def resolve(text: str) -> str:
        text = LINK.sub(lambda found: found[1] + _site_link(page.file, found[2], found[3] or ""), text)
        return PICTURE.sub(
            lambda found: "![{alt}]({light}#only-light)![{alt}]({dark}#only-dark)".format(**found.groupdict()), text
        )

    return _outside_fences(markdown, resolve)


def _outside_fences(markdown: str, change: Any) -> str:
    """Applies ``change`` to the text outside of fenced code blocks."""
    parts, position = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[position : fence.start()]), fence[0]]
        position = fence.end()
    return "".join([*parts, change(markdown[position:])])


def _generated(config: MkDocsConfig, page: str, text: str, *, in_nav: bool = True) -> File:
    file = File.generated(config, page, content=text)
    file.inclusion = InclusionLevel.INCLUDED if in_nav else InclusionLevel.NOT_IN_NAV
    return file


def _written_at(file: File) -> str:
    """Returns the path of a page's Markdown file in the repository."""
    return next((name for name, page in PAGES.items() if page == file.src_uri), f"docs/{file.src_uri}")


def _target(file: File, link: str) -> str | None:
    """Returns the repository path that a link points to; None for a URL or an anchor."""
    if not link or re.match(r"[a-z]+:|/", link):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(_written_at(file)), link))


def _repository_files(page: File) -> list[str]:
    """Returns the files and directories outside of docs/ and conf/ that a page links to."""
    links = LINK.finditer(FENCE.sub("", page.content_string))
    targets = [target for link in links if (target := _target(page, link[2])) is not None]
    return [target for target in dict.fromkeys(targets) if _site_page(target) is None and (ROOT / target).exists()]


def _site_page(target: str) -> str | None:
    """Returns the page or other file of the site for a repository path; None if there is none."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target == "conf":
        return "reference/index.md"
    if target.startswith("conf/") and not target.startswith(("conf/hydra/help", "conf/sweeps/wandb")):
        name = target.removeprefix("conf/")
        if target.endswith(".yaml"):
            name = name.removesuffix(".yaml")
            return f"reference/{page_name(posixpath.dirname(name))}#{anchor(name)}"
        return f"reference/{page_name(name)}"
    return None


def _source_page(target: str) -> str:
    return f"source/{target}.md"


def _site_link(file: File, link: str, fragment: str) -> str:
    """Converts a link of a page to a link within the site."""
    if (target := _target(file, link)) is None:
        return link + fragment
    if not (ROOT / target).exists():
        return link + fragment  # MkDocs warns about it
    page, _, own = (_site_page(target) or _source_page(target)).partition("#")
    relative = os.path.relpath(page, posixpath.dirname(file.src_uri) or ".").replace(os.sep, "/")
    return relative + (f"#{own}" if own else fragment)


def _show_file(target: str) -> str:
    """Renders a page with the content of a file or a directory; the page is excluded from the search."""
    path = ROOT / target
    names = [f"{inside.name}{'/' * inside.is_dir()}" for inside in path.iterdir()] if path.is_dir() else []
    text = "\n".join(sorted(names)) if names else path.read_text(encoding="utf-8", errors="replace")
    language = LANGUAGES.get(posixpath.splitext(target)[1], "text")
    head = f"---\nsearch:\n  exclude: true\ntitle: {target}\n---\n\n# `{target}`\n"
    return f"{head}\n``````{language}\n{text.rstrip()}\n``````\n"

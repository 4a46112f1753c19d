"""Checks that the built site has no broken links and that its pages load no external resources.

Usage: ``python docs/tools/check_site.py site``
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links and anchors of an HTML page.

    Attributes:
        links: URLs in the page, each with whether the browser fetches it when the page is opened.
        anchors: IDs and names that a link can point to.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects the links and anchors of one tag."""
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and name in ("href", "src", "srcset"):
                self.links.append((value.split()[0], tag != "a"))


def broken_links(site: Path) -> Iterator[str]:
    """Yields a message for each broken link and for each external resource that a page loads."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        if path.name == "404.html":  # its links are relative to the root of the deployed site
            continue
        for link, is_fetched in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto") or (parts.netloc and not is_fetched):
                continue
            name = path.relative_to(site)
            if parts.netloc:
                yield f"{name} loads {link} from the network"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name} links to {link}, which does not exist"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}, but {target.relative_to(site)} has no such anchor"


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    problems = sorted(set(broken_links(place)))
    print("\n".join([*problems, f"{place}: {len(list(place.rglob('*.html')))} pages, {len(problems)} broken links"]))
    sys.exit(bool(problems) or not (place / "index.html").exists())

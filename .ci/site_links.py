"""Check the built documentation site: every link, image and anchor within it exists. Exit code 1 if one does not.

`make docs` runs this after mkdocs, which does not check links to files outside docs/.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parent.parent / "build" / "site"


class Links(HTMLParser):
    """The `ids` of a page, and its `targets`: what its links, images and scripts point to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]


def broken_links(site: Path) -> list[str]:
    """A line for each target that does not exist, with its page."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    if not pages:
        raise SystemExit(f"There is no site in {site}.")
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or page.name == "404.html":  # 404.html is made for the root of a host
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            is_anchor_missing = path in pages and parts.fragment and unquote(parts.fragment) not in pages[path].ids
            if not path.is_relative_to(site) or not path.is_file() or is_anchor_missing:
                broken.append(f"{page.relative_to(site)}: {target}")
    return broken


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else SITE.resolve())
    print("\n".join(found) or "All links of the site lead to pages and anchors that exist.")
    sys.exit(bool(found))

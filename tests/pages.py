"""Checks that a report's page is well-formed, self-contained and, in a browser, free of errors and scroll bars.

`python tests/pages.py PAGE PNG` writes a picture of a whole page.
"""

from __future__ import annotations

import html.entities
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "img", "br", "hr"}
# Elements that end an open paragraph, so that its end tag would have nothing to close.
BLOCKS = {"p", "div", "table", "ul", "dl", "h1", "h2", "section", "details", "pre", "header"}
# Element -> the only elements that its children may be.
CHILDREN = {"table": {"tr"}, "tr": {"th", "td"}, "ul": {"li"}, "dl": {"dt", "dd"}, "html": {"head", "body"}}
PARENTS = {"tr": "table", "th": "tr", "td": "tr", "li": "ul", "dt": "dl", "dd": "dl", "summary": "details"}
MEASURE = """<script>addEventListener("load", () => {
  const page = document.documentElement, images = [...document.images];
  document.querySelectorAll("details").forEach(d => d.open = true);
  const inner = [...document.querySelectorAll("body *")].filter(e => e.scrollWidth > e.clientWidth + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX)).map(e => e.outerHTML.slice(0, 80));
  document.body.dataset.measured = JSON.stringify({width: page.scrollWidth, room: page.clientWidth, inner,
    height: page.scrollHeight, images: images.length, broken: images.filter(i => !i.naturalWidth || !i.width).length});
})</script>"""


class _Strict(HTMLParser):
    """Collects the faults of a page, where a browser would repair them in silence."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.faults: list[str] = []
        self.open: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self.open[-1] if self.open else None
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            self.faults.append(f"<{tag}>")
        if parent in CHILDREN and tag not in CHILDREN[parent]:
            self.faults.append(f"<{tag}> in <{parent}>")
        if tag in PARENTS and parent != PARENTS[tag]:
            self.faults.append(f"<{tag}> outside of <{PARENTS[tag]}>")
        if tag in BLOCKS and "p" in self.open:
            self.faults.append(f"<{tag}> in <p>")
        self._attributes(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def _attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if len(given) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag == "img" and not given.get("alt"):
            self.faults.append("<img> without alt")
        if given.get("id") in self.ids:
            self.faults.append(f"id {given['id']!r} twice")
        self.ids |= {value for name, value in attrs if name == "id" and value}
        for name, value in attrs:
            if name.startswith("on") or name == "href" or "url(" in (value or ""):
                self.faults.append(f"<{tag} {name}={value!r}>")
            if name == "src" and not re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", value or ""):
                self.faults.append(f"<{tag} src={(value or '')[:40]!r}>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> where {self.open[-1:]} is open")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.faults += [f"style: {found}" for found in re.findall(r"@import|url\(", data)]
        elif re.search(r"[<>&]", data):
            self.faults.append(f"not escaped: {data[:40]!r}")
        if self.open and self.open[-1] in CHILDREN and data.strip():
            self.faults.append(f"text in <{self.open[-1]}>: {data.strip()[:40]!r}")

    def handle_entityref(self, name: str) -> None:
        if name not in html.entities.name2codepoint:
            self.faults.append(f"&{name};")


def faults(page: str) -> list[str]:
    """The objections of a strict parser to a page."""
    parser = _Strict()
    parser.feed(page)
    parser.close()
    doctype = [] if page.startswith("<!doctype html>") else ["no doctype at the start"]
    return doctype + parser.faults + [f"<{tag}> is not closed" for tag in parser.open]


def browser() -> str | None:
    """A Chromium of this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def chromium(page: Path, *options: str) -> tuple[str, list[str]]:
    """The output of a headless Chromium for a page, and the messages on its console."""
    program = browser()
    assert program is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
        command += ["--enable-logging=stderr", "--v=0", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, width: int = 1000) -> dict[str, Any]:
    """Sizes of a page in a window, with all details open: what would need a scroll bar, and which images are broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        # The page itself allows no script.
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
        copy.write_text(text.replace("</head>", MEASURE + "</head>"), encoding="utf-8")
        shown, _ = chromium(copy, f"--window-size={width},800", "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', shown)
    assert found is not None, shown[-500:]
    return json.loads(html.unescape(found[1]))


def printed_pages(page: Path) -> int:
    """Sheets of paper that printing takes."""
    with tempfile.TemporaryDirectory() as folder:
        chromium(page, f"--print-to-pdf={folder}/page.pdf", "--no-pdf-header-footer")
        return len(re.findall(rb"/Type\s*/Page\b", Path(folder, "page.pdf").read_bytes()))


def screenshot(page: Path, picture: Path, width: int = 1000, height: int | None = None) -> None:
    """Write a PNG of the top of a page, or of the whole."""
    height = measured(page, width)["height"] if height is None else height
    chromium(page, f"--window-size={width},{height}", f"--screenshot={picture.absolute()}")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), height=int(sys.argv[3]) if len(sys.argv) > 3 else None)

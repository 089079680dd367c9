"""Extensions of MkDocs beyond its plugins (mkdocs.yml): links to files outside docs/, and docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Published next to the pages, which link to them as `../<folder>/<file>`, as in the repository.
PUBLISHED = ("benchmarks", "examples", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the published files."""
    for name in PUBLISHED:
        source = ROOT / name
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and path.suffix != ".pyc":
                target = _published(path.relative_to(ROOT).as_posix())
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to published files for the site, and remove `no-run`, which only the tests use."""
    markdown = markdown.replace("```python no-run", "```python")
    here = "../" * page.file.src_uri.count("/")
    links = rf"\]\({re.escape(here)}\.\./((?:{'|'.join(map(re.escape, PUBLISHED))})[^)]*)\)"
    return re.sub(links, lambda match: f"]({here}{_published(match[1])})", markdown)


def _published(path: str) -> str:
    """The path of a file on the site. Markdown is published as text, because as a page its links would be broken."""
    return f"files/{path}" + (".txt" if path.endswith((".md", "LICENSE")) else "")


class Docstrings(griffe.Extension):
    """Turn what docstrings say in reStructuredText, formulas and references, into Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = re.sub(r":(?:func|class|meth):`([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"^( *)\.\. math::((?:[ \n]+.+)+?)(?=\n\s*\n|\Z)", _formula, text, flags=re.MULTILINE)
            items = r"^( +)(\w+)((?:, \w+)+): (.+(?:\n\1 {4}.+)*)"
            obj.docstring.value = re.sub(items, _one_each, text, flags=re.MULTILINE)


def _formula(match: re.Match[str]) -> str:
    indent, body = match[1], " ".join(match[2].split())
    return f"{indent}$$\n{indent}{body}\n{indent}$$"


def _one_each(match: re.Match[str]) -> str:
    """`a, b: text` as an entry for a and one for b, so that both find their types and defaults."""
    indent, first, others, body = match.groups()
    entries = [f"{indent}{first}: {body}", *(f"{indent}{name}: see {first}." for name in others[2:].split(", "))]
    return "\n".join(entries)

"""Hooks for mkdocs.yml.

They add README.md (as the front page), CHANGELOG.md, CONTRIBUTING.md and the benchmark results to the site. Links in
the Markdown files work in the repository; a hook turns them into links between pages of the site.
"""

import ast
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
LINK = re.compile(r"(?<=\]\()([^()#\s:]+)(?=[#)])")


def _site_path(path: str) -> str:
    """Return the path in the site of a file in the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _shown() -> dict[str, Path]:
    """Return the files outside docs/ that the site shows, by their path in the site."""
    paths = [path for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]
    return {_site_path(path.relative_to(ROOT).as_posix()): path for path in paths}


def on_config(config: Any) -> Any:
    """Add the version to the title, and expand each pattern in `nav` to the matching pages that it does not list."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "spigan" / "_version.py").read_text())
    assert version, "spigan/_version.py states no version"
    config.site_name += f" {version[1]}"
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    pages += [path for path in _shown() if path.endswith(".md")]
    listed = [entry for section in config.nav for entries in section.values() for entry in entries]

    def expand(entry: str) -> list[str]:
        if "*" not in entry:
            return [entry]
        same = [page for page in pages if page.count("/") == entry.count("/") and fnmatch(page, entry)]
        return [page for page in same if page not in listed]

    config.nav = [
        {title: [page for entry in entries for page in expand(entry)]}
        for section in config.nav
        for title, entries in section.items()
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/."""
    for path, source in _shown().items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    folder = Path(page.file.abs_src_path).parent

    def relative(match: re.Match[str]) -> str:
        target = os.path.relpath(folder / match[1], ROOT).replace(os.sep, "/")
        path = _site_path(target)
        if files.get_file_from_path(path) is None:
            return match[1]  # mkdocs reports a broken link
        return os.path.relpath(path, os.path.dirname(page.file.src_uri) or ".").replace(os.sep, "/")

    return LINK.sub(relative, markdown)


class Fields(griffe.Extension):
    """Show the default and the description of `name: T = Field(default, description="...")` in the API reference."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the docstring and the default from a call of `Field`."""
        call = attr.value
        if not (isinstance(call, griffe.ExprCall) and str(call.function) == "Field"):
            return
        named = {item.name: item.value for item in call.arguments if isinstance(item, griffe.ExprKeyword)}
        if "description" in named:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(named["description"])), parent=attr)
        attr.value = next((item for item in call.arguments if not isinstance(item, griffe.ExprKeyword)), None)

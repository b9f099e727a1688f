"""Links of the documentation to files of the repository outside ``docs/``: they are copied into the site under ``files/``.

On a forge the pages link to the files themselves (``../baselines/full.py``). In the site those links lead to the copies;
code is copied with ``.txt`` behind its name, so that a browser shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
"""A Markdown link: before the target, target, anchor, end."""


def local(target: str) -> bool:
    """Whether a link's target is a file of this repository."""
    return "://" not in target and not target.startswith("mailto:")


def in_site(path: str) -> str:
    """Where a file of the repository (path from its root) stands in the site, as a path from the docs folder."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" + ("" if posixpath.splitext(path)[1] in (".md", ".png", ".svg", ".json", ".csv") else ".txt")


def origin(place: str) -> str:
    """The reverse of ``in_site`` for pages."""
    return place.removeprefix("files/") if place.startswith("files/") else f"docs/{place}"


def on_files(files, config):
    root = Path(config.config_file_path).parent
    pages = [origin(page.src_uri) for page in files.documentation_pages()]
    for page in pages:  # grows: a copied page may link to others
        for _, target, _, _ in LINK.findall((root / page).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if not local(target) or files.get_file_from_path(in_site(path)) or not (root / path).is_file():
                continue  # a file that is not there stays a dead link, which the strict build reports
            files.append(File.generated(config, in_site(path), abs_src_path=str(root / path)))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown, page, config, files):
    here = origin(page.file.src_uri)

    def moved(link: re.Match) -> str:
        before, target, anchor, end = link.groups()
        if not local(target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        return before + posixpath.relpath(in_site(path), posixpath.dirname(page.file.src_uri) or ".") + (anchor or "") + end

    return LINK.sub(moved, markdown)

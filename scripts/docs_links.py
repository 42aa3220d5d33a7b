"""A hook of mkdocs: links from pages to files of the repository outside ``docs/`` become plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page's text with such links replaced by their label. mkdocs calls this for each page."""
    docs = Path(config["docs_dir"]).resolve()
    here = (docs / page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        outside = not target.is_relative_to(docs) or target.is_dir() or target.suffix == ".json"
        return link[1] if outside else link[0]

    return LINK.sub(replaced, markdown)

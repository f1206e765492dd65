"""What `make docs` does beyond the site generator: links into the repository, and the promise to load nothing."""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A link to a file of the repository outside docs/ becomes its path, which has to exist."""
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent

    def settle(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(docs.resolve()):
            return match[0]  # the generator checks those
        if not target.exists():
            raise SystemExit(f"{page.file.src_uri}: broken link to {match[2]}")
        path = target.relative_to(docs.resolve().parent)
        return f"`{path}`" if match[1].strip("`") == str(path) else f"{match[1]} (`{path}`)"

    return _LINK.sub(settle, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch something from elsewhere when it is read."""
    found = _LOADED.search(output)
    if found:
        raise SystemExit(f"{page.file.src_uri} loads something from the network: {found[0]}")
    return output

"""What `make docs` does beyond the site generator: links into the repository, nothing from elsewhere, local search."""

import json
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
    """Refuse a page that would fetch something from elsewhere when it is read; one of a folder takes worker.js."""
    found = _LOADED.search(output)
    if found:
        raise SystemExit(f"{page.file.src_uri} loads something from the network: {found[0]}")
    up = "../" * page.file.dest_uri.count("/")
    write = f"""document.write('<script src="{up}search/worker.js"><\\/script>')"""
    own = f'<script>location.protocol === "file:" && {write}</script>'
    return re.sub(r"(?=<script src=\"[^\"]*/bundle\.)", lambda _: own, output, count=1)


def on_post_build(config: Any, **_: Any) -> None:
    """Let search work from a folder: a page of file:// may fetch nothing and start no worker from a file.

    search_index.js is where the theme looks then; worker.js starts the search from its own text.
    """
    site = Path(config["site_dir"])
    (site / "search/search_index.js").write_text(f"var __index = {(site / 'search/search_index.json').read_text()}")
    [worker] = (site / "assets/javascripts/workers").glob("search.*.min.js")
    text = json.dumps(worker.read_text().partition("\n//# sourceMappingURL")[0])
    start = "function (_) { return new FromFile(URL.createObjectURL(new Blob([text]))) }"
    (site / "search/worker.js").write_text(f"{{ const FromFile = Worker, text = {text}; Worker = {start} }}\n")

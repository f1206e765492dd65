"""The texts beside an export: the model card (base, data, recipe, scores, hashes, licence), and Ollama's Modelfile."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petool_lite.export.hub import card_data

from petool_lite.families import end_tokens
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import Base
from petool_lite.recipe import ALL

_TEXT = """---
{head}
---

# {name}

{base}, tuned by petool-lite {version} to answer with one call of the tool that its user prefers ({setting},
prompt style `{style}`). It expects the prompts that petool-lite renders and is not meant for general chat.
{licence}
## Files

| file | size | SHA-256 |
| --- | ---: | --- |
{files}

## Checks

{changed_tensors} of {tensors} trained tensors changed, by {relative_change:.2%} in norm.

{checks}

{scores}
## Training

{kept:,} rows from `{source}` (SHA-256 `{sha256}`), {tokens:,} tokens; {trained}. The recipe:

```toml
{recipe}
```
"""
_UNSCORED = "## Scores\n\nNot scored yet: `petool-lite bench`, then export again.\n"


def card(run: Path, base: Base, manifest: dict[str, Any], document: dict[str, Any]) -> str:
    """The card's text, Markdown with a YAML head that the Hub reads. `document` is the content of export.json."""
    known, report = licence(base), run / "bench" / "report.md"
    trained = f"all weights learned, SHA-256 `{document.get('model_sha256')}`"
    if document["method"] != "full":
        stored = "dequantized NF4" if document["merge_base"] == "nf4" else "the base stores it"
        trained = f"adapter SHA-256 `{document['adapter_sha256']}`, merged into the base as {stored}"
    files = (f"| {item['file']} | {item['bytes'] / 1e6:,.0f} MB | `{item['sha256']}` |" for item in document["files"])
    return _TEXT.format(
        head=card_data(run, base.name, known).to_yaml(),
        **{"name": run.name, "base": base.name, "style": manifest["prompt_style"], "trained": trained},
        version=document["versions"].get("petool-lite", "unknown"),
        setting="all settings" if manifest["setting"] == ALL else f"{manifest['setting']} setting",
        licence="" if known else "\nThe base names no licence; see where it came from.\n",
        files="\n".join(files),
        **{key: document[key] for key in ("changed_tensors", "tensors", "relative_change")},
        checks="\n".join(f"- {name}: {', '.join(figures(found))}" for name, found in document["checks"].items()),
        scores=report.read_text().replace("# ", "## ") if report.is_file() else _UNSCORED,
        recipe=(run / "recipe.toml").read_text().strip(),
        **{key: manifest["data"][key] for key in ("kept", "source", "sha256", "tokens")},
    )


def figures(checks: Mapping[str, Any]) -> list[str]:
    """What was found of one file, in words."""
    words = {
        "prompts_with_equal_ids": "{prompts_with_equal_ids} prompts with equal ids",
        "replies": "{replies_stopped} of {replies} replies stop",
        "against_transformers": "top-1 agreement with the merged model {against_transformers[top1]:.1%}, "
        "KL {against_transformers[kl]:.3g}",
    }
    return [text.format(**checks) for key, text in words.items() if key in checks]


def licence(base: Base) -> str:
    """The base's licence as its GGUF or its own card names it, or an empty string."""
    import gguf

    if base.gguf:
        return str(gguf_fields(open_gguf(base.gguf)).get("general.license", ""))
    named = gguf.Metadata.load(None, base.directory).license
    return ", ".join(named) if isinstance(named, list) else named or ""


def modelfile(gguf: str, directory: Path, max_tokens: int) -> str:
    """The Modelfile of the file `gguf` beside it: greedy, stopping at the end tokens of the base in `directory`.
    `max_tokens` is the context in tokens. The template is left to the GGUF file, which holds it."""
    stops = [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in end_tokens(directory)]
    lines = [f"FROM ./{gguf}", *stops, "PARAMETER temperature 0", f"PARAMETER num_ctx {max_tokens}"]
    return "\n".join(lines) + "\n"

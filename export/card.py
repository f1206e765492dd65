"""The texts beside an export: the model card (base, data, recipe, scores, hashes, licence), and Ollama's Modelfile."""

import json
from pathlib import Path
from typing import Any

from petool_lite.export.hub import model_index

from petool_lite.families import end_tokens
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import Base, is_hub_id
from petool_lite.recipe import ALL

_HEAD = """---
{head}---

# {name}

{base}, tuned by petool-lite {version} to answer with one call of the tool that its user prefers ({setting},
prompt style `{style}`). It expects the prompts that petool-lite renders and is not meant for general chat.
"""


def card(run: Path, base: Base, manifest: dict[str, Any], document: dict[str, Any]) -> str:
    """The card's text, Markdown with a YAML head that the Hub reads. `document` is the content of export.json."""
    from huggingface_hub.utils import yaml_dump

    setting = "all settings" if manifest["setting"] == ALL else f"{manifest['setting']} setting"
    version, known = document["versions"].get("petool-lite", "unknown"), licence(base)
    head: dict[str, Any] = {"base_model": base.name} if is_hub_id(base.name) else {}
    head |= {"license": known or "other", "library_name": "gguf", "tags": ["tool-calling", "petool-lite", "gguf"]}
    head |= {"model-index": index} if (index := model_index(run.name, run)) else {}
    words = {"head": yaml_dump(head, sort_keys=False), "version": version, "setting": setting}
    parts = [_HEAD.format(base=base.name, name=run.name, style=manifest["prompt_style"], **words)]
    if not known:
        parts.append("The base names no licence; see where it came from.\n")
    rows = [f"| {item['file']} | {item['bytes'] / 1e6:,.0f} MB | `{item['sha256']}` |" for item in document["files"]]
    parts.append("\n".join(["## Files", "", "| file | size | SHA-256 |", "| --- | ---: | --- |", *rows, ""]))
    parts.append(_checks(document))
    parts.append(scores(run))
    data = manifest["data"]
    parts.append(
        "## Training\n\n"
        f"{data['kept']:,} rows from `{data['source']}` (SHA-256 `{data['sha256']}`), {data['tokens']:,} tokens; "
        f"{_trained(document)}. The recipe:\n\n"
        f"```toml\n{(run / 'recipe.toml').read_text().strip()}\n```\n"
    )
    return "\n".join(parts)


def _trained(document: dict[str, Any]) -> str:
    if document["method"] == "full":
        return f"all weights learned, SHA-256 `{document['model_sha256']}`"
    stored = "dequantized NF4" if document["merge_base"] == "nf4" else "the base stores it"
    return f"adapter SHA-256 `{document['adapter_sha256']}`, merged into the base as {stored}"


def licence(base: Base) -> str:
    """The base's licence as its GGUF or its own card names it, or an empty string."""
    import gguf

    if base.gguf:
        return str(gguf_fields(open_gguf(base.gguf)).get("general.license", ""))
    named = gguf.Metadata.load(None, base.directory).license
    return ", ".join(named) if isinstance(named, list) else named or ""


def _checks(document: dict[str, Any]) -> str:
    full = document["method"] == "full"
    how = f"{document['changed_tensors']} of {document['tensors']} tensors changed" if full else ""
    how = how or f"{document['merged_tensors']} tensors changed by the adapter"
    lines = [
        "## Checks",
        "",
        f"{how}, by {document['relative_change']:.2%} in norm.",
        "",
        "| file type | prompts with equal ids | replies that stop | top-1 as transformers | KL to transformers, nats |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in document["checks"].items():
        stopped = f"{found['replies_stopped']} of {found['replies']}" if "replies" in found else ""
        against = found.get("against_transformers")
        figures = f"{against['top1']:.4f} | {against['kl']:.3g}" if against else "not run | not run"
        lines.append(f"| {name} | {found.get('prompts_with_equal_ids', '')} | {stopped} | {figures} |")
    return "\n".join([*lines, ""])


def scores(run: Path) -> str:
    """The scores section: what bench found for this run, or that it has not run yet."""
    file = run / "bench" / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    if report.get("schema") != 4:
        return "## Scores\n\nNot scored yet by this version: `petool-lite bench`, then export again.\n"
    text = "| {name}{0} | {n} | {tool_acc:.1f} % | {param_acc:.1f} % | {joint_acc:.1f} % |"
    rows = [text.format(" (partial)" if item["partial"] else "", **item) for item in report["variants"]]
    head = ["| file | n | tool | parameters | both |", "| --- | ---: | ---: | ---: | ---: |"]
    source = ", ".join(f"`{item['source']}` ({item['setting']})" for item in report["data"])
    scorers = " and ".join(dict.fromkeys(item["scorer"] for item in report["variants"]))
    return "\n".join(["## Scores", "", f"On {source}, scorer: {scorers}.", "", *head, *rows, ""])


def modelfile(gguf: str, directory: Path, max_tokens: int) -> str:
    """The Modelfile of the file `gguf` beside it: greedy, stopping at the end tokens of the base in `directory`.
    `max_tokens` is the context in tokens. The template is left to the GGUF file, which holds it."""
    stops = [f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in end_tokens(directory)]
    lines = [f"FROM ./{gguf}", *stops, "PARAMETER temperature 0", f"PARAMETER num_ctx {max_tokens}"]
    return "\n".join(lines) + "\n"

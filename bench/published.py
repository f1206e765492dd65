"""The published table of the rating setting (published.toml), and which of our runs may stand beside it."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import PurePosixPath
from typing import Any

_SETTING, _ENTRIES = "rating", 1000
_FILES = ("user_entries_test.json", "user_entries_test_r.json")


def partial_reasons(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Why a variant was not scored on the whole of its data; empty if it was."""
    total, found = meta["data"]["total"], []
    if meta.get("limit") and meta["limit"] < total:
        found.append(f"limited to {meta['limit']} of {total:,} entries")
    if meta.get("shard"):
        found.append("one shard of the data")
    if len(rows) < meta["entries"] or not meta["complete"]:
        found.append(f"{len(rows):,} of {meta['entries']:,} entries so far")
    broken = sum(row["status"] == "engine_error" for row in rows)
    if broken:
        found.append(f"the engine failed on {broken:,} entries, which are not scored")
    return found


def not_published_data(meta: Mapping[str, Any]) -> str:
    """Why a variant's data is not the published rating test set; empty if it is, by file name and number of entries."""
    data = meta["data"]
    name = PurePosixPath(data["source"].replace("\\", "/")).name.removesuffix(".zip")
    if meta["setting"] != _SETTING:
        return f"the published table is of the {_SETTING} setting"
    if name not in _FILES or data["total"] != _ENTRIES:
        return f"{data['source']} with {data['total']:,} entries is not the published test set"
    return ""


def published_table(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The published rows with their notes, and the names of our variants that may stand beside them. A partial run or
    other data never does; `left_out` says why. Without any of ours there is no table: `rows` is empty."""
    held = tomllib.loads(resources.files("petool_lite.bench").joinpath("published.toml").read_text(encoding="utf-8"))
    left_out: dict[str, list[str]] = {}
    for item in variants:
        why = ["partial: " + "; ".join(item["partial"])] if item["partial"] else []
        why += [item["other_data"]] if item["other_data"] else []
        left_out |= {item["name"]: why} if why else {}
    ours = [item["name"] for item in variants if item["name"] not in left_out]
    rows = [{"name": name, "tool_acc": tool, "param_acc": param, "notes": list(notes)}
            for name, (tool, param, notes) in held["rows"].items()]  # fmt: skip
    shown = {"rows": rows, "notes": held["notes"]} if ours else {"rows": [], "notes": {}}
    return {"source": "published, not run here", "ours": ours, **shown, "left_out": left_out}

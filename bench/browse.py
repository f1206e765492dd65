"""The rows of a report as compact data for the page that shows single replies: every text is stored once."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from petool_lite.bench.errors import CLASSES, FAULTS
from petool_lite.bench.score import METRICS, SCORERS
from petool_lite.bench.tables import letters

if TYPE_CHECKING:
    from petool_lite.bench.report import Scored


class _Texts:
    """Texts by number, each kept once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def browser_data(scored: Sequence["Scored"]) -> dict[str, Any]:
    """What report.js reads. Texts are numbers into `texts`.

    entries: [id, setting, gold tool, gold parameters, [offered], [same job], history length, liked share or -1].
    rows: [variant, entry, reply, class, marks, prompt tokens, seconds, prompt hash, [fault texts], finish, index];
    bit 3 * scorer + metric of `marks` says right, scorers and metrics in the order of bench.score.
    """
    texts = _Texts()
    entries: dict[tuple[str, str], int] = {}
    made: list[list[Any]] = []
    rows = []
    for number, item in enumerate(scored):
        for row, mark, name, faults in zip(item.results.rows, item.marks, item.classes, item.faults, strict=True):
            key = row["setting"], row["entry_id"]
            if key not in entries:
                entries[key] = len(made)
                made.append(_entry(row, texts))
            rights = [mark.right(metric, scorer) for scorer in SCORERS for metric in METRICS]
            wrong = [f"{name}: {FAULTS[kind]}" for name, kind in faults.items()]
            rows.append(
                [
                    number,
                    entries[key],
                    texts.number(row.get("reply", "") if row["status"] == "ok" else row.get("error") or row["status"]),
                    list(CLASSES).index(name),
                    sum(right << place for place, right in enumerate(rights)),
                    row["prompt_tokens"],
                    round(row["seconds"], 3),
                    texts.number((row.get("prompt_sha256") or "")[:16]),
                    [texts.number(text) for text in wrong],
                    texts.number(row.get("finish", "")),
                    row["index"],
                ]
            )
    return {
        "variants": [[letter, item.name] for letter, item in zip(letters(len(scored)), scored, strict=True)],
        "classes": [[name.replace("_", " "), meaning] for name, meaning in CLASSES.items()],
        "entries": made,
        "rows": rows,
        "texts": list(texts.numbers),
    }


def _entry(row: dict[str, Any], texts: _Texts) -> list[Any]:
    gold, facts = row["gold"], row["facts"]
    share = facts.get("liked_share")
    return [
        texts.number(row["entry_id"]),
        texts.number(row["setting"]),
        texts.number(gold["tool_name"]),
        texts.number(json.dumps(gold["parameters"], ensure_ascii=False)),
        [texts.number(name) for name in facts["offered"]],
        [texts.number(name) for name in facts["same_job"]],
        facts["history_length"],
        -1 if share is None else round(share, 2),
    ]

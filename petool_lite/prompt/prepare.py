"""From a recipe's data to token ids on disk, once: parsed, fitted, tokenized, in an Arrow file that the trainer maps
into memory. Its key covers all that decides an id: data, tokenizer, template, layout and the code that renders."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from petool_lite.console import Report, silent
from petool_lite.data.answers import with_rejected
from petool_lite.data.files import Dataset, load_dataset, load_settings, source_sha256
from petool_lite.data.petoolbench import PROMPT_FIELD
from petool_lite.errors import PetoolError
from petool_lite.models import Base, file_sha256
from petool_lite.places import cache_place
from petool_lite.prompt.render import Chat, Example, Layout, cut_descriptions, examples, spread
from petool_lite.recipe import ALL, DataSettings, Recipe
from petool_lite.runs import draft, write_json

# The code that decides token ids: a change to any of these files makes cached rows stale.
_RENDERERS = ("data/*.py", "data/*.toml", "prompt/*.py", "prompt/*.jinja", "text.py", "families.py")
_CHUNK = 512  # rows in memory at once


@dataclass(frozen=True)
class Prepared:
    """Rows ready for training: `table` has entry_id, input_ids (int32), answer_start, history_dropped, and in `earlier`
    start and end of each learned answer before that one; for DPO rejected_ids, worse than input_ids[answer_start:]."""

    table: Any
    summary: dict[str, Any]
    left_out: tuple[str, ...]
    data_sha256: str


def prepare(recipe: Recipe, base: Base, chat: Chat, report: Report = silent) -> Prepared:
    """The recipe's training data, fitted and tokenized once. Raises PetoolError for bad data, or where no row fits."""
    digest = source_sha256(recipe.data.train)
    folder = cache_place("prepared", _key(recipe, base, chat, digest))
    if not (folder / "summary.json").is_file():
        with draft(folder) as work:
            work.mkdir()
            _write(recipe, chat, work, report)
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    found = json.loads((folder / "summary.json").read_text())
    if not found["summary"]["kept"]:
        raise PetoolError(f"no row fits {recipe.model.max_tokens} tokens", "raise model.max_tokens")
    return Prepared(Dataset.from_file(str(folder / "rows.arrow")), found["summary"], tuple(found["left_out"]), digest)


def _key(recipe: Recipe, base: Base, chat: Chat, digest: str) -> str:
    package = Path(__file__).parent.parent
    facts = {
        "code": [file_sha256(file) for pattern in _RENDERERS for file in sorted(package.glob(pattern))],
        "data": digest,
        "settings": asdict(recipe.data) | {"train": ""},  # the bytes matter, not where they lie
        **{"max_tokens": recipe.model.max_tokens, "seed": recipe.train.seed, "objective": recipe.train.objective},
        "tokenizer": file_sha256(base.directory / "tokenizer.json"),
        "template": chat.template_sha256,
        "tokens": [chat.bos_token, chat.eos_token],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def load_learned(data: DataSettings, source: str) -> list[Dataset]:
    """The entries of `source` in each setting that the recipe learns: its own, or with "all" each that they have.
    Raises PetoolError for an entry that lacks one (with `skip_bad` it is left out), and where "all" finds but one."""
    if data.setting != ALL:
        return [load_dataset(source, data.setting, data.skip_bad)]
    if len(sets := load_settings(source, data.skip_bad)) < 2:
        what = f"{source} does not hold the prompts of several settings, which data.setting = all learns from"
        raise PetoolError(what, f"entries with {', '.join(PROMPT_FIELD.values())}, or --set data.setting=rating")
    return sets


def _write(recipe: Recipe, chat: Chat, folder: Path, report: Report) -> None:
    data, pairs = recipe.data, recipe.train.objective == "dpo"
    report("reading the training data", 0, 0, "")
    sets = load_learned(data, data.train)
    layout = Layout(data.style, recipe.model.max_tokens, data.overlength)
    # one setting after the other, which is as good as any order: training draws its own
    entries = [entry for dataset in sets for entry in dataset.entries]
    entries = with_rejected(entries, recipe.train.seed) if pairs else entries
    if data.setting == ALL:  # ids tell which
        entries = [replace(entry, id=f"{entry.setting}:{entry.id}") for entry in entries]
    if not entries:
        hint = "dpo takes rows with chosen and rejected, or entries that offer the same function of another provider"
        raise PetoolError(f"{data.train} gives no pair of a right and a wrong answer", hint)
    left_out: list[str] = []
    facts: list[tuple[int, int, int, bool, bool]] = []  # of each row: tokens, answers, tokens with loss, trimmed, cut

    def rows() -> Iterator[Example]:
        for number, (entry, row) in enumerate(zip(entries, examples(chat, entries, layout, pairs), strict=True), 1):
            if row is None:  # too long
                left_out.append(entry.id)
            else:
                cut = layout.style == "petool" and cut_descriptions(entry) > 0
                facts.append((len(row.ids), 1 + len(row.earlier) // 2, row.learned, row.history_dropped > 0, cut))
                yield row
            if number % 100 == 0 or number == len(entries):
                report("tokenizing", number, len(entries), "")

    _write_rows(folder / "rows.arrow", rows(), pairs)
    lengths, answers, losses, trimmed, cut = zip(*facts, strict=True) if facts else ((),) * 5
    count = sum(len(dataset.entries) for dataset in sets)
    summary: dict[str, Any] = {"entries": len(sets[0].entries), "bad_entries": sum(len(one.bad) for one in sets)}
    summary |= {"rows": count, "kept": len(facts), "trimmed": sum(trimmed), "descriptions_cut": sum(cut)}
    summary |= {"left_out": len(left_out), **{f"tokens_{name}": value for name, value in spread(lengths).items()}}
    summary |= {"tokens": sum(lengths), "answers": sum(answers), "loss_tokens": sum(losses)}
    summary |= {"without_pair": count - len(entries)} if pairs else {}
    # the published prompt's text around its arrays, by setting, for calls that do not come with it
    first = [entry for dataset in sets for entry in dataset.entries[:1] if data.style == "published"]
    wording = {e.setting: [e.published.head, e.published.middle, e.published.tail] for e in first if e.published}
    summary |= {"wording": wording} if wording else {}
    write_json(folder / "summary.json", {"summary": summary, "left_out": left_out})


def _write_rows(path: Path, rows: Iterable[Example], pairs: bool) -> None:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    ids = List(Value("int32"))
    columns = {"entry_id": Value("string"), "input_ids": ids, "answer_start": Value("int32")}
    columns |= {"history_dropped": Value("int32"), "earlier": ids} | ({"rejected_ids": ids} if pairs else {})
    with ArrowWriter(features=Features(columns), path=str(path), writer_batch_size=_CHUNK) as writer:
        for row in rows:
            values = (row.entry_id, row.ids, row.answer_start, row.history_dropped, row.earlier, row.rejected)
            writer.write(dict(zip(columns, values, strict=False)))  # without `rejected` where there are no pairs
        writer.finalize()

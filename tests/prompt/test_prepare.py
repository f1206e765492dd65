"""Preparing: same rows as one by one, cached by content, nothing vanishes uncounted."""

import json
from pathlib import Path

import pytest
from support_published import published_rows, training_row

from petool_lite.data import SETTINGS, files
from petool_lite.data.files import load_dataset
from petool_lite.data.petoolbench import PROMPT_FIELD
from petool_lite.errors import PetoolError
from petool_lite.prompt import prepare as prepare_module
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import Layout, chat_from_directory, example
from petool_lite.recipe import load_recipe


def prepared(smollm2, *overrides):
    settings = ["model.max_tokens=2048", *overrides]
    return prepare(load_recipe("demo", settings)[1], smollm2, chat_from_directory(smollm2.directory))


def written(path: Path, rows: list) -> str:
    path.write_text(json.dumps(rows))
    return f"data.train={path}"


def test_rows_are_those_of_the_renderer(smollm2) -> None:
    found = prepared(smollm2, "data.train=demo:train:150")
    chat = chat_from_directory(smollm2.directory)
    for entry, row in zip(load_dataset("demo:train:150").entries, found.table, strict=True):
        wanted = example(chat, entry, Layout("petool", 2048))
        assert (row["input_ids"], row["answer_start"], row["entry_id"]) == (wanted.ids, wanted.answer_start, entry.id)
    assert found.summary["rows"] == found.summary["kept"] == 150
    assert found.summary["tokens"] == sum(len(row["input_ids"]) for row in found.table)


def test_the_second_time_comes_from_the_cache_and_a_change_does_not(smollm2, tmp_path, monkeypatch) -> None:
    source = written(tmp_path / "rows.json", published_rows("train", 5))
    first = prepared(smollm2, source)
    monkeypatch.setattr("petool_lite.prompt.prepare.load_dataset", lambda *_: 1 / 0)  # who parses again, fails
    again = prepared(smollm2, source)
    assert again.table.to_list() == first.table.to_list()
    assert (again.summary, again.data_sha256) == (first.summary, first.data_sha256)
    for change in ("data.style=published", "model.max_tokens=512", "data.setting=preferred", "train.seed=1"):
        with pytest.raises(ZeroDivisionError):
            prepared(smollm2, source, change)
    monkeypatch.setattr(prepare_module, "_RENDERERS", ("prompt/petool.jinja",))
    with pytest.raises(ZeroDivisionError):
        prepared(smollm2, source)


def test_nothing_vanishes_uncounted(smollm2, tmp_path) -> None:
    rows = published_rows("train", 6)
    del rows[4]["query"]
    source = written(tmp_path / "rows.json", rows)
    with pytest.raises(PetoolError, match=r"entry 4 \(entry_id '4'\), query"):
        prepared(smollm2, source)
    lengths = prepared(smollm2, source, "data.skip_bad=true").summary
    assert (lengths["entries"], lengths["bad_entries"], lengths["kept"]) == (5, 1, 5)
    tight = [source, "data.skip_bad=true", f"model.max_tokens={lengths['tokens_max'] - 1}"]
    assert prepared(smollm2, *tight).summary["trimmed"] >= 1
    dropped = prepared(smollm2, *tight, "data.overlength=drop")
    assert len(dropped.left_out) == dropped.summary["left_out"] == 5 - dropped.summary["kept"] >= 1
    with pytest.raises(PetoolError, match="no row fits 16 tokens"):
        prepared(smollm2, source, "data.skip_bad=true", "model.max_tokens=16")


def test_pairs_have_a_wrong_answer_of_an_equal_tool(smollm2, tmp_path) -> None:
    rows, chat = published_rows("train", 8), chat_from_directory(smollm2.directory)
    found = prepared(smollm2, written(tmp_path / "rows.json", rows), "train.objective=dpo", "model.adapter=x")
    assert found.summary["rows"] == len(found.table) == 8
    for row in found.table:
        right, wrong = chat.decode(row["input_ids"][row["answer_start"] :]), chat.decode(row["rejected_ids"])
        assert (right != wrong, right.split(">.<")[2]) == (True, wrong.split(">.<")[2])
    lone = written(tmp_path / "lone.json", [training_row(row) for row in rows[:2]])
    assert prepared(smollm2, lone, "train.objective=dpo", "model.adapter=x").summary["kept"] == 2


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_all_settings_are_the_rows_of_each(smollm2, tmp_path, objective) -> None:
    source = written(tmp_path / "rows.json", published_rows("train", 12))
    more = [source, f"train.objective={objective}", *(["model.adapter=x"] if objective == "dpo" else [])]
    single = {name: prepared(smollm2, *more, f"data.setting={name}") for name in SETTINGS}
    every = prepared(smollm2, *more, "data.setting=all")
    wanted = [row | {"entry_id": f"{name}:{row['entry_id']}"} for name in SETTINGS for row in single[name].table]
    assert every.table.to_list() == wanted
    for key in ("rows", "kept", "trimmed", "descriptions_cut", "left_out", "tokens", "loss_tokens"):
        assert every.summary[key] == sum(found.summary[key] for found in single.values())


def test_all_settings_are_those_that_the_entries_hold(smollm2, tmp_path, monkeypatch) -> None:
    rows = [{key: row[key] for key in row if key != "instruction_ratings"} for row in published_rows("train", 4)]
    found = prepared(smollm2, written(tmp_path / "two.json", rows), "data.setting=all")
    assert {name.split(":")[0] for name in found.table["entry_id"]} == {"preferred", "chronological"}
    once, read = [], files._read
    monkeypatch.setattr(files, "_read", lambda part: once.append(part) or read(part))
    both = prepared(smollm2, f"data.train={tmp_path}/two.json + demo:train:3", "data.setting=all")
    assert both.summary["rows"] == 4 + 4 + 3, "what has no setting is learned once"
    assert once == [f"{tmp_path}/two.json", "demo:train:3"], "each part is read once, whatever it costs"
    lone = [training_row(row) for row in published_rows("train", 4)]
    del rows[2][PROMPT_FIELD["preferred"]]
    for bad, said in ((lone, "does not hold the prompts of several settings"), (rows, "entry 2")):
        with pytest.raises(PetoolError, match=said):
            prepared(smollm2, written(tmp_path / f"{len(said)}.json", bad), "data.setting=all")

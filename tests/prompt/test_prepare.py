"""Preparing: same rows as one by one, cached by content, nothing vanishes uncounted."""

import json

import pytest
from petool_lite.data.agreement import follows, untold
from petool_lite.data.jobs import likeliest
from petool_lite.data.values import drafted

from petool_lite import prepare as prepare_module
from petool_lite.data.demo import generate
from petool_lite.data.entries import PROMPT_FIELD, SETTINGS
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
from petool_lite.models import cache_root
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import Layout, answer_weights, chat_from_directory, example
from petool_lite.recipe import load_recipe


def prepared(smollm2, *overrides):
    return prepare(load_recipe("demo", overrides)[1], smollm2, chat_from_directory(smollm2.directory))


def test_rows_are_those_of_the_renderer(smollm2) -> None:
    found = prepared(smollm2, "data.train=demo:train:150")
    chat = chat_from_directory(smollm2.directory)
    layout = Layout("rating", "compact", 1024)
    for entry, row in zip(load_dataset("demo:train:150", "rating").entries, found.table, strict=True):
        wanted = example(chat, entry, layout)
        assert (row["input_ids"], row["answer_start"], row["entry_id"]) == (wanted.ids, wanted.answer_start, entry.id)
    assert found.summary["rows"] == found.summary["kept"] == 150
    assert found.summary["tokens"] == sum(len(row["input_ids"]) for row in found.table)


def test_rows_whose_values_nothing_tells_are_left_out_and_counted(smollm2, tmp_path) -> None:
    rows = generate("train", 60)
    entries = load_dataset("demo:train:60", "rating").entries
    stated = [drafted(likeliest(entry.prompt("rating"), entry.query, "rating"), entry.query) for entry in entries]
    told = [index for index, entry in enumerate(entries) if stated[index] == entry.gold.parameters]
    assert len(told) > 6, "a required value that nobody states contradicts nothing, so these alone will do"
    for index in told[:3]:
        values = rows[index]["api_call_ground_truth"]["parameters"]
        values[next(iter(values))] = "what nobody said"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    every = prepared(smollm2, f"data.train={tmp_path / 'rows.json'}")
    assert len(every.table) == 60
    assert "untold" not in every.summary
    found = prepared(smollm2, f"data.train={tmp_path / 'rows.json'}", "data.skip_untold=true")
    kept = set(found.table["entry_id"])
    assert not kept & {entries[index].id for index in told[:3]}
    assert kept >= {entries[index].id for index in told[3:]}
    assert found.summary["untold"] == 60 - found.summary["kept"] >= 3


def test_published_entries_whose_values_nothing_tells(open_entries) -> None:
    """Such as a video's address in 26 of them, which neither request nor declaration has."""
    entries = load_dataset(str(open_entries), "rating").entries
    assert sum(untold(entry, "rating") for entry in entries) == 90
    assert not any(untold(entry, "rating") and follows(entry, "rating") for entry in entries)


def test_weights_are_a_column_of_their_own(smollm2) -> None:
    chat = chat_from_directory(smollm2.directory)
    plain = prepared(smollm2, "data.train=demo:train:30", "train.name_weight=1", "train.value_weight=1")
    assert plain.table.column_names == ["entry_id", "input_ids", "answer_start", "history_dropped"]
    found = prepared(smollm2, "data.train=demo:train:30", "train.name_weight=2", "train.value_weight=0.5")
    assert found.table.remove_columns("answer_weights").to_list() == plain.table.to_list()
    assert found.summary == plain.summary
    for entry, row in zip(load_dataset("demo:train:30", "rating").entries, found.table, strict=True):
        assert row["answer_weights"] == list(answer_weights(chat, entry.gold, 2.0, 0.5))
        assert len(row["answer_weights"]) == len(row["input_ids"]) - row["answer_start"]
        assert set(row["answer_weights"]) == {2.0, 0.5, 1.0}


def test_rows_of_other_weights_have_a_place_of_their_own(smollm2) -> None:
    """And those of weight 1 have the one that they had before there were any."""
    chat = chat_from_directory(smollm2.directory)
    pairs = [("1", "1"), ("2", "1"), ("1", "2"), ("0", "1"), ("1.0", "1.0")]
    settings = [[f"train.name_weight={name}", f"train.value_weight={value}"] for name, value in pairs]
    keys = [prepare_module._key(load_recipe("demo", pair)[1], smollm2, chat, "same data") for pair in settings]
    assert keys[0] == keys[-1] == prepare_module._key(load_recipe("demo")[1], smollm2, chat, "same data")
    assert len(set(keys)) == 4


def test_the_second_time_comes_from_the_cache_and_a_change_does_not(smollm2, tmp_path, monkeypatch) -> None:
    path = tmp_path / "rows.json"
    rows = generate("train", 5)
    path.write_text(json.dumps(rows))
    first = prepared(smollm2, f"data.train={path}")

    def refuse(*_, **__):
        raise AssertionError("parsed again")

    monkeypatch.setattr("petool_lite.prompt.prepare.load_dataset", refuse)
    again = prepared(smollm2, f"data.train={path}")
    assert again.table.to_list() == first.table.to_list()
    assert (again.summary, again.data_sha256) == (first.summary, first.data_sha256)
    for change in ("data.style=published", "model.max_tokens=512", "data.shuffle_copies=1", "train.seed=1"):
        with pytest.raises(AssertionError, match="parsed again"):
            prepared(smollm2, f"data.train={path}", change)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="parsed again"):
        # another renderer: without it in the key, old rows would train a model that inference never asks that way
        patch.setattr("petool_lite.prompt.prepare._RENDERERS", ("compact.py",))
        prepared(smollm2, f"data.train={path}")
    path.write_text(json.dumps(rows[:4], indent=3))  # other bytes than any other test prepares
    with pytest.raises(AssertionError, match="parsed again"):
        prepared(smollm2, f"data.train={path}")
    assert not list((cache_root() / "prepared").glob(".*.draft"))


def test_long_and_broken_rows_are_counted(smollm2, tmp_path) -> None:
    rows = generate("train", 6)
    rows[2]["query"] = None
    rows[3]["query"] = "very " * 2000
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(PetoolError, match=r"rows.json, entry 2 .*query"):
        prepared(smollm2, f"data.train={path}")
    found = prepared(smollm2, f"data.train={path}", "data.skip_bad=true")
    summary = found.summary
    assert (summary["entries"], summary["bad_entries"], summary["kept"], summary["left_out"]) == (5, 1, 4, 1)
    assert found.left_out == (str(rows[3]["entry_id"]),)


def test_augmentation_adds_rows_and_keeps_the_originals(smollm2) -> None:
    plain = prepared(smollm2, "data.train=demo:train:20")
    more = prepared(smollm2, "data.train=demo:train:20", "data.shuffle_copies=2", "data.counterfactual=true")
    assert more.summary["entries"] == 20
    assert more.summary["rows"] == 20 + 40 + 20
    assert more.table.select(range(20)).to_list() == plain.table.to_list()
    rating = prepared(smollm2, "data.train=demo:train:20", "data.style=published").summary
    assert rating["rows"] == 20


def test_the_cache_knows_all_code_that_makes_rows() -> None:
    """What prompt and augment import, however far down, is part of the key: else old rows outlive a change."""
    import ast
    from pathlib import Path

    from petool_lite import prepare

    folder = Path(prepare.__file__).parent
    found, waiting = {"prepare.py"}, ["prompt.py", "data/augment.py"]
    while waiting:
        name = waiting.pop()
        if name in found or name == "errors.py":
            continue
        found.add(name)
        nodes = ast.walk(ast.parse((folder / name).read_text()))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        waiting += [m.removeprefix("petool_lite.").replace(".", "/") + ".py" for m in modules if "petool_lite." in m]
    assert sorted(prepare._RENDERERS) == sorted(found)


def shorn(path, index, field, count=6):
    """A file of entries, one of them without one of its prompts."""
    rows = generate("train", count)
    del rows[index][field]
    path.write_text(json.dumps(rows))
    return f"data.train={path}"


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_all_settings_are_the_rows_of_each(smollm2, objective) -> None:
    made = [
        "data.train=demo:train:12", "data.held_out=demo:test:5", "data.shuffle_copies=1", "data.counterfactual=true",
        "data.history_queries=2", "data.renamed_copies=1", "data.described_queries=1", "train.seed=3",
        f"train.objective={objective}",
    ]  # fmt: skip
    single = {name: prepared(smollm2, *made, f"data.setting={name}") for name in SETTINGS}
    every = prepared(smollm2, *made, "data.setting=all")
    wanted = [row | {"entry_id": f"{name}:{row['entry_id']}"} for name in SETTINGS for row in single[name].table]
    assert every.table.to_list() == wanted
    assert len(set(every.table["entry_id"])) == len(wanted) > 3 * 12
    for key in ("rows", "kept", "trimmed", "descriptions_cut", "left_out", "tokens", "loss_tokens"):
        assert every.summary[key] == sum(found.summary[key] for found in single.values())
    assert every.summary["entries"] == 12
    assert every.summary.get("without_pair") == (
        sum(found.summary["without_pair"] for found in single.values()) if objective == "dpo" else None
    )


def test_an_entry_that_lacks_a_setting_of_the_others_is_refused_by_name(smollm2, tmp_path) -> None:
    for number, field in enumerate(PROMPT_FIELD.values()):
        source = shorn(tmp_path / f"{number}.json", 4, field)
        with pytest.raises(PetoolError, match=r"entry 4 has no prompt for the setting"):
            prepared(smollm2, source, "data.setting=all")
        summary = prepared(smollm2, source, "data.setting=all", "data.skip_bad=true").summary
        assert (summary["entries"], summary["bad_entries"], summary["rows"]) == (5, 1, 15)


def test_all_settings_are_those_that_the_entries_hold(smollm2, tmp_path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps([row for row in generate("train", 4) if row.pop("instruction_ratings")]))
    found = prepared(smollm2, f"data.train={path}", "data.setting=all")
    assert {name.split(":")[0] for name in found.table["entry_id"]} == {"preferred", "chronological"}
    rows = [{"instruction": row["instruction_ratings"], "input": row["query"]} for row in generate("train", 4)]
    path.write_text(json.dumps(rows))
    with pytest.raises(PetoolError, match="does not hold the prompts of several settings"):
        prepared(smollm2, f"data.train={path}", "data.setting=all")


def test_rows_of_all_settings_have_a_place_of_their_own(smollm2) -> None:
    chat = chat_from_directory(smollm2.directory)
    recipes = [load_recipe("demo", [f"data.setting={name}"])[1] for name in (*SETTINGS, "all")]
    assert len({prepare_module._key(recipe, smollm2, chat, "same data") for recipe in recipes}) == 4

"""Results files that are cut, mixed, foreign or nonsense: named in one line, never a traceback. Merged shards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_bench import answer, called, meta, plain, row, rows_of, write_results
from support_fuzz import cases, value

from petool_lite.bench.engines import Task
from petool_lite.bench.report import build_report, html_report, markdown_report, write_report
from petool_lite.bench.results import load_folder, load_results, merge_shards
from petool_lite.bench.run import bench, generate
from petool_lite.bench.variants import rule_variant
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError

ENTRIES = called(4)


def rows(**more) -> list[dict]:
    return [row(entry, index, answer(entry), **more) for index, entry in enumerate(ENTRIES)]


def test_rows_come_in_the_order_of_the_data_without_a_last_line_that_was_cut(tmp_path, command) -> None:
    made = rows()
    made[0]["reply"] = "one\u2028two\u0085three\x0bfour"  # line ends of Unicode
    path = write_results(tmp_path, made[::-1])
    found = load_results(path)
    assert [item["index"] for item in found.rows] == [0, 1, 2, 3]
    assert (found.rows[0]["reply"], found.cut_line, found.name) == (made[0]["reply"], False, "tuned")
    path.write_bytes(path.read_bytes()[:-70])
    (tmp_path / "results-base.jsonl").write_text("")  # only begun: left out
    result = command("bench", "score", path)
    assert (result.returncode, "last line of results-tuned.jsonl was cut" in result.stdout) == (0, True)
    (item,) = write_report(tmp_path)["variants"]
    assert (item["cut_line"], item["partial"]) == (True, ["3 of 4 entries so far"])
    path.write_text("")
    with pytest.raises(PetoolError, match="no result in"):
        write_report(tmp_path)


def test_a_wrong_line_is_named(tmp_path) -> None:
    for change, said in (
        (lambda r: r[1].pop("gold"), "line 2: 'gold' is a required property"),
        (lambda r: r[1]["facts"].update(offered=3), "line 2: facts.offered 3 is not of type 'array'"),
        (lambda r: r[2].update(schema=2), "line 3: made by another version .* \\(schema 2, this one reads 3"),
        (lambda r: r[3].update(entry_id=r[0]["entry_id"]), f"line 4: entry {ENTRIES[0].id} is there already"),
        (lambda r: r[3].update(setting="preferred"), "line 4: setting preferred, but rating in"),
        (lambda r: r[0].update(status="done"), "line 1: status 'done' is not one of"),
        (lambda r: r[0].update(seconds=float("nan")), "line 1: not JSON"),
    ):
        change(made := rows())
        path = write_results(tmp_path, made)
        with pytest.raises(PetoolError, match=said) as caught:
            load_results(path)
        assert "--fresh" in caught.value.hint


@cases(25)
@given(data=st.data())
def test_any_line_and_any_meta_file_is_scored_or_refused_in_words(tmp_path, data) -> None:
    """Values of any kind in any place, and lines that are anything: a report or a PetoolError."""
    made, about = json.loads(json.dumps([rows(), meta(rows())]))
    for item in made[: data.draw(st.integers(0, 2))]:
        target = data.draw(st.sampled_from([item, item["facts"], item["gold"]["parameters"], about, about["data"]]))
        target[data.draw(st.sampled_from([*sorted(target), "more"]))] = data.draw(value)
        item["reply"] = data.draw(st.text()) + json.dumps({"tool_name": "t", "parameters": data.draw(value)})
    path = write_results(tmp_path, rows())
    lines = [json.dumps(item).encode() for item in made] + [data.draw(st.binary(max_size=20))]
    path.write_bytes(b"\n".join(lines))
    path.with_name("results-tuned.meta.json").write_text(json.dumps(about))
    try:  # as write_report makes it, without waiting for a disk
        scored = load_folder(tmp_path)
        document = build_report(scored)
        json.dumps(document, ensure_ascii=False).encode()
        (markdown_report(document) + html_report(document, scored)).encode()
    except PetoolError as error:
        assert error.message


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with everything and three shards of 7 entries, by two rules."""
    root, task = tmp_path_factory.mktemp("shards"), Task(load_dataset("demo:test:7"), 8)
    variants = [rule_variant("rule-first"), rule_variant("rule-random")]
    generate(variants, task, root / "whole")
    for place in range(3):
        assert bench(variants, replace(task, shard=(place, 3)), root) is None, "a shard has no report"
    return root


def test_merged_shards_are_what_one_command_makes(shards, tmp_path) -> None:
    merge_shards([shards / f"shard-{place}-of-3" for place in (2, 1, 0)], tmp_path)
    for one, other in zip(load_folder(tmp_path), load_folder(shards / "whole"), strict=True):
        assert plain(rows_of(one.path)) == plain(rows_of(other.path))
        assert [item["index"] for item in rows_of(one.path)] == list(range(7))
        for key in ("variant", "entries", "complete", "model_sha256", "data", "shard", "limit", "max_reply_tokens"):
            assert one.meta[key] == other.meta[key]


def test_shards_that_do_not_fit_are_named_and_nothing_is_written(shards, tmp_path) -> None:
    merged = tmp_path / "merged"
    folders = [shutil.copytree(shards / f"shard-{place}-of-3", tmp_path / f"s{place}") for place in range(3)]
    file = folders[1] / "results-rule-first.meta.json"
    right = json.loads(file.read_text())
    for values, words in (
        ({"complete": False}, "s1/results-rule-first.jsonl is not finished: 2 of 2 entries"),
        ({"shard": [0, 3]}, "not all shards of one bench.*s1/results-rule-first.jsonl is shard 0/3"),
        ({"model_sha256": "0" * 64}, "another model"),
        ({"data": {"source": "other.json", "sha256": "0" * 64, "total": 7}}, "another data set: .*other.json"),
    ):
        file.write_text(json.dumps(right | values))
        with pytest.raises(PetoolError, match=words):
            merge_shards(folders, merged)
    file.write_text(json.dumps(right))
    with pytest.raises(PetoolError, match="not all shards of one bench"):
        merge_shards(folders[::2], merged)
    with pytest.raises(PetoolError, match="is one of the shards"):
        merge_shards(folders, folders[0])
    (folders[2] / "results-rule-first.jsonl").unlink()
    with pytest.raises(PetoolError, match=r"no such results file: .*s2/results-rule-first\.jsonl"):
        merge_shards(folders, merged)
    assert not merged.exists()

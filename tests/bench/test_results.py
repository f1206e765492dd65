"""Results files that are cut, mixed, foreign or nonsense: named in one line, never a traceback."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from petool_lite.bench.page import html_report
from petool_lite.bench.report import build_report, markdown_report, write_report
from petool_lite.bench.results import load_folder, load_results, load_rows
from support_bench import answer, called, meta, row, write_results

from petool_lite.errors import PetoolError

ENTRIES = called(4)


def rows(**more) -> list[dict]:
    return [row(entry, index, answer(entry), **more) for index, entry in enumerate(ENTRIES)]


def test_rows_come_back_in_the_order_of_the_data_with_any_line_end_of_unicode_in_a_reply(tmp_path) -> None:
    made = rows()
    made[0]["reply"] = "one\u2028two\u0085three\x0bfour"
    found = load_results(write_results(tmp_path, made[::-1]))
    assert [item["index"] for item in found.rows] == [0, 1, 2, 3]
    assert (found.rows[0]["reply"], found.cut_line, found.name) == (made[0]["reply"], False, "tuned")


def test_a_last_line_cut_in_the_middle_is_left_out_and_said(tmp_path, command) -> None:
    path = write_results(tmp_path, rows())
    path.write_bytes(path.read_bytes()[:-70])
    found, cut = load_rows(path)
    assert (len(found), cut) == (3, True)
    result = command("bench", "score", path)
    assert (result.returncode, "last line was cut" in result.stderr) == (0, True)
    document = write_report(tmp_path)
    assert document["variants"][0]["cut_line"]
    assert document["variants"][0]["partial"] == ["3 of 4 entries so far"]
    assert "the last line of results-tuned.jsonl was cut" in (tmp_path / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[1].pop("gold"), "line 2: 'gold' is a required property"),
        (lambda r: r[1].update(gold={"tool_name": 3, "parameters": {}}), "line 2: gold"),
        (lambda r: r[2].pop("schema"), "line 3: made by another version of petool-lite (schema 1, this one reads 3)"),
        (lambda r: r[3].update(entry_id=r[0]["entry_id"]), f"line 4: entry {ENTRIES[0].id} was on line 1 already"),
        (lambda r: r[3].update(setting="preferred"), "line 4: setting preferred, but rating above"),
        (lambda r: r[0].update(status="done"), "line 1: status 'done' is not one of"),
        (lambda r: r[0].update(seconds=float("nan")), "line 1: not JSON"),
        (lambda r: r[0]["facts"].pop("offered"), "line 1: facts 'offered' is a required property"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, said) -> None:
    change(made := rows())
    path = tmp_path / "results-tuned.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in made))
    with pytest.raises(PetoolError) as caught:
        load_rows(path)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_broken_line_before_the_last_is_refused(tmp_path) -> None:
    path = write_results(tmp_path, rows())
    first, second, *rest = path.read_text().split("\n")
    deep = "[" * 5000 + "]" * 5000
    for raw, said in (
        ("\n".join([first, second[:50], *rest]).encode(), "line 2: not JSON"),
        (first.replace('"parameters": {', f'"parameters": {{"deep": {deep}, ', 1).encode() + b"\n", "line 1: "),
        (b"\xff\xfe\n", "line 1: not UTF-8"),
        (b"", "has no result"),
    ):
        path.write_bytes(raw)
        with pytest.raises(PetoolError, match=said):
            load_rows(path)


def test_files_that_do_not_belong_together_are_refused(tmp_path) -> None:
    write_results(tmp_path, rows())
    other = {"source": "other.json", "sha256": "ff" * 32, "total": 4}
    path = write_results(tmp_path, rows(variant="base"), data=other)
    with pytest.raises(PetoolError, match=r"made from demo:test:40.*other.json: other data"):
        load_folder(tmp_path)
    made = rows(variant="base")
    made[2]["gold"]["parameters"] = {"else": 1}
    write_results(tmp_path, made)
    with pytest.raises(PetoolError, match=f"differ in the right answer of entry {ENTRIES[2].id}"):
        load_folder(tmp_path)
    path.with_name("results-base.meta.json").unlink()
    with pytest.raises(PetoolError, match=r"has no results-base\.meta\.json beside it"):
        load_results(path)
    path.with_name("results-base.meta.json").write_text(json.dumps(meta(rows(), entries=4)))
    with pytest.raises(PetoolError, match="variant is tuned, its rows say base"):
        load_results(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def report_of(folder) -> dict:
    """The report in all its forms, as write_report makes them, without waiting for a disk."""
    scored = load_folder(folder)
    document = build_report(scored)
    json.dumps(document, ensure_ascii=False).encode()
    (markdown_report(document) + html_report(document, scored)).encode()
    return document


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_line_and_any_meta_file_is_scored_or_refused_in_words(tmp_path, data) -> None:
    """Values of any kind in any place, and lines that are anything: a report or a PetoolError."""
    made, about = json.loads(json.dumps([rows(), meta(rows())]))
    for item in made[: data.draw(st.integers(0, 2))]:
        target = data.draw(st.sampled_from([item, item["facts"], item["gold"]["parameters"]]))
        target[data.draw(st.sampled_from([*sorted(target), "more"]))] = data.draw(JSON)
        if data.draw(st.booleans()):
            call = {"tool_name": "t", "parameters": data.draw(JSON)}
            item["reply"] = data.draw(st.text()) + json.dumps(call) + data.draw(st.sampled_from(["", "}", "\n"]))
    path = write_results(tmp_path, rows())
    lines = [json.dumps(item).encode() for item in made]
    if data.draw(st.booleans()):
        lines.insert(data.draw(st.integers(0, 4)), data.draw(st.binary(max_size=20)))
    path.write_bytes(b"\n".join(lines) + data.draw(st.sampled_from([b"", b"\n"])))
    for _ in range(data.draw(st.integers(0, 2))):
        target = data.draw(st.sampled_from([about, about["machine"], about["data"], about["versions"]]))
        target[data.draw(st.sampled_from([*sorted(target), "more"]))] = data.draw(JSON)
    path.with_name("results-tuned.meta.json").write_text(json.dumps(about))
    try:
        document = report_of(tmp_path)
    except PetoolError as error:
        assert error.message
    else:
        assert document["variants"][0]["rows"] >= 1


def test_a_variant_that_was_only_begun_is_left_out_and_said(tmp_path) -> None:
    write_results(tmp_path, rows())
    (tmp_path / "results-base.jsonl").write_text("")
    document = write_report(tmp_path)
    assert (document["empty"], document["partial"]) == (["results-base.jsonl"], True)
    assert "results-base.jsonl has no reply yet" in (tmp_path / "report.md").read_text().replace("\\", "")
    (tmp_path / "results-tuned.jsonl").write_text("")
    with pytest.raises(PetoolError, match="no result in"):
        write_report(tmp_path)

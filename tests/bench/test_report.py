"""The report of a folder: its schema, its written forms, partial runs, the published table, comparing two runs."""

import json
import random
from importlib import resources

import jsonschema
import pytest
from support_bench import answer, called, row, write_results

from petool_lite.bench import report
from petool_lite.bench.compare import compare_folders
from petool_lite.bench.report import markdown_report, print_report, tables, write_report
from petool_lite.bench.score import CLASSES
from petool_lite.bench.variants import rule_variant
from petool_lite.console import terminal
from petool_lite.errors import PetoolError

ENTRIES = called(40)
BASELINE = {"engine": "none", "decoding": "none", "style": "none", "seconds": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
HOSTILE = (
    "</script><img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>",
    "<!--<script>", "]]>", "\u2028</style><svg onload=window.pwned=1>", "${window.pwned=1}", "\\u003c/script>",
)  # fmt: skip


def rows(right: int, wrong: str = "no call", count: int = 40, **more) -> list[dict]:
    """Rows of the first `count` demo entries, of which the first `right` are right."""
    chosen = enumerate(ENTRIES[:count])
    return [row(entry, index, answer(entry) if index < right else wrong, **more) for index, entry in chosen]


@pytest.fixture
def folder(tmp_path):
    """Three variants: 30 and 20 of 40 right, and a baseline."""
    write_results(tmp_path, rows(30), started="1")
    write_results(tmp_path, rows(20, variant="base"), started="2")
    guesses = [item | {"reply": json.dumps({"tool_name": item["facts"]["offered"][0], "parameters": {}})}
               for item in rows(40, variant="rule-first", **BASELINE)]  # fmt: skip
    none = {"model_bytes": 0, "model_sha256": None, "peak_memory_gb": None}
    write_results(tmp_path, guesses, started="3", about=rule_variant("rule-first").about, **none)
    return tmp_path


def test_report_json_follows_its_schema_and_counts_right(folder) -> None:
    document = write_report(folder)
    assert json.loads((folder / "report.json").read_text()) == document
    schema = json.loads(resources.files("petool_lite.bench").joinpath("report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)
    tuned, base, first = document["variants"]
    assert [item["name"] for item in document["variants"]] == ["tuned", "base", "rule-first"]
    assert (tuned["n"], tuned["joint_acc"], base["joint_acc"]) == (40, 75.0, 50.0)
    for item in document["variants"]:
        assert list(item["classes"]) == list(CLASSES)
        assert sum(item["classes"].values()) == 40
        assert item["classes"]["right"] == round(item["joint_acc"] * 40 / 100)
    assert base["classes"]["no_call"] == 20
    pair = next(item for item in document["pairs"] if {item["first"], item["second"]} == {"tuned", "base"})
    assert (pair["joint"]["first_only"], pair["joint"]["second_only"], pair["joint"]["difference"]) == (10, 0, -25.0)
    assert pair["joint"]["p"] == pytest.approx(2 / 2**10)
    cost = tuned["cost"]
    assert (cost["cold"]["n"], cost["warm"]["n"], cost["cold"]["median_s"]) == (1, 39, 0.75)
    assert (cost["warm"]["median_s"], cost["warm"]["p95_s"]) == (0.95, 1.13)
    read = sum(700 + index - 100 * (index > 0) for index in range(40))
    assert cost["prefill_tokens_per_s"] == pytest.approx(read / 20, abs=0.01)
    assert cost["decode_tokens_per_s"] == pytest.approx(120)
    assert (first["cost"]["warm"]["median_s"], first["cost"]["model_bytes"]) == (None, None)


def test_a_report_is_rebuilt_to_the_byte_from_results_alone_and_bench_score_agrees(folder, found) -> None:
    write_report(folder)
    written = {name: (folder / name).read_bytes() for name in ("report.json", "report.md", "report.html")}
    for name in written:
        (folder / name).unlink()
    assert found("bench", "report", folder) == json.loads(written["report.json"])
    assert {name: (folder / name).read_bytes() for name in written} == written
    assert found("bench", "score", folder / "results-tuned.jsonl")["variants"][0]["joint_acc"] == 75.0
    assert found("bench", "score", folder) == json.loads(written["report.json"])


def test_only_a_whole_run_on_the_published_entries_stands_beside_the_published_table(folder) -> None:
    data = {"source": "hub:travisxu/PEToolBench/user_entries_test_r.json", "sha256": "ee" * 32, "total": 1000}
    facts = {"setting": "rating", "data": data, "entries": 1000, "complete": True, "limit": None}
    document = write_report(folder)
    for count, changes, why in (
        (1000, {"limit": 5000}, ""),
        (100, {"limit": 100, "entries": 100}, "limited to 100 of 1,000 entries"),
        (900, {"complete": False}, "900 of 1,000 entries so far"),
        (1000, {"status": "engine_error"}, "the engine failed on 1,000 entries"),
        (1000, {"data": data | {"source": "fold0.jsonl"}}, ""),
        (1000, {"setting": "preferred"}, ""),
    ):
        meta = facts | changes
        partial = report.partial_reasons([{"status": meta.get("status", "ok")}] * count, meta)
        assert why in " ".join(partial)
        document["variants"][0] |= {"partial": partial, "published_data": report.is_published_data(meta)}
        table = {found.key: found for found in tables(document)}.get("published")
        assert (table is not None) == ("limit" in changes and not why), changes
        if table:
            found = {row[0].split(" [")[0]: row[2:] for row in table.rows}
            assert (len(found), found["PEToolLLaMA"]) == (10, ("78.4", "89.7"))


def test_folders_of_several_settings_make_one_report_by_setting(tmp_path, command) -> None:
    write_results(tmp_path / "r", rows(30))
    write_results(tmp_path / "p", rows(10, setting="preferred"))
    document = write_report(tmp_path / "r", tmp_path / "p", target=tmp_path / "both")
    found = {item["name"]: item["joint_acc"] for item in document["variants"]}
    assert (found, document["pairs"]) == ({"tuned (rating)": 75.0, "tuned (preferred)": 25.0}, [])
    assert not (tmp_path / "r" / "report.md").exists()
    twice = command("bench", "report", tmp_path / "r", tmp_path / "r", "--out", tmp_path / "twice")
    assert (twice.returncode, "occurs twice" in twice.stderr) == (1, True)


def test_a_narrow_terminal_shows_all_and_no_cell_breaks_markdown(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(terminal(), "width", 50)
    document = write_report(folder)
    print_report(document)
    text = capsys.readouterr().out
    assert "…" not in text
    for figure in ("75.0", "(60–86)", "50.0", "-25.0", "0.95", "no model: the first tool of the list"):
        assert figure in text
    document["data"][0]["source"] = "a|b`<img>.json"
    assert "a\\|b\\`\\<img\\>.json" in markdown_report(document)


def test_compare_tests_common_entries_lists_the_flipped_and_refuses_what_does_not_compare(tmp_path, command) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "bench"
    write_results(old, rows(20))
    random.Random(0).shuffle(made := rows(32, count=36, variant="tuned"))
    write_results(new, made, limit=36, entries=36)
    found = compare_folders(old, new)["variants"][0]
    assert (found["n"], found["entries"]) == (36, [40, 36])
    assert (found["joint"]["second_only"], found["joint"]["first_only"]) == (12, 0)
    assert found["scores"][0]["joint_acc"] == pytest.approx(100 * 20 / 36, abs=1e-3)
    assert found["flipped"] == [entry.id for entry in ENTRIES[20:32]]
    shown = command("bench", "compare", old, new.parent)
    assert shown.returncode == 0, shown.stderr
    assert "12 entries flipped" in shown.stdout
    assert json.loads(command("bench", "compare", old, new, "--json").stdout)["variants"][0] == found

    write_results(tmp_path / "data", rows(20), data={"source": "x.json", "sha256": "00" * 32, "total": 40})
    for name in ("base", "other"):
        write_results(tmp_path / "names", rows(20, variant=name))
    write_results(tmp_path / "few", rows(20, count=10))
    write_results(tmp_path / "apart", rows(40)[31:])
    refused = {"old data": "other data", "old names": "no variant to compare", "few apart": "no scored entry in common"}
    for folders, said in refused.items():
        with pytest.raises(PetoolError, match=said):
            compare_folders(*(tmp_path / name for name in folders.split()))
    found = compare_folders(tmp_path / "old", tmp_path / "names", "tuned", "base")
    assert found["variants"][0]["agreement"] == 100.0


def test_figures_as_asked_stand_beside_the_published_ones_where_they_differ(tmp_path, command) -> None:
    def asked(entry, index: int, said: object) -> dict:
        gold = {"tool_name": entry.answer.name, "parameters": {"kg": 46}}
        reply = json.dumps(gold | {"parameters": {"kg": said}})
        return row(entry, index, reply) | {"gold": gold, "query": "Ship 46.046 kg."}

    for name, cut in (("old", 5), ("new", 25)):
        made = [asked(entry, index, 46.046 if index < cut else 46) for index, entry in enumerate(ENTRIES)]
        write_results(tmp_path / name, made)
        (item,) = write_report(tmp_path / name)["variants"]
        assert (item["joint_acc"], item["as_asked"]["joint_acc"]) == (100 - 2.5 * cut, 100.0)
        assert "| both as asked |" in (tmp_path / name / "report.md").read_text()
    found = compare_folders(tmp_path / "old", tmp_path / "new")["variants"][0]
    assert (found["joint"]["difference"], found["joint_as_asked"]["difference"]) == (-50.0, 0.0)
    assert [scores["param_as_asked_acc"] for scores in found["scores"]] == [100.0, 100.0]
    assert "asked" in command("bench", "compare", tmp_path / "old", tmp_path / "new").stdout


def test_a_temperature_goes_from_the_replies_into_the_next_export(tmp_path, command) -> None:
    from petool_lite.export.run import _own_keys

    run = tmp_path / "run"
    write_results(run / "bench", rows(30, confidence=0.97), data={"source": "x", "sha256": "ab" * 32, "total": 40})
    refused = command("bench", "report", run, "--calibrate", "base")
    assert (refused.returncode, "no replies of base" in refused.stderr) == (2, True)
    (run / "manifest.json").write_text('{"prompt_style": "petool", "setting": "none", "data": {}}')
    result = command("bench", "report", run, "--calibrate", "tuned", "--json")
    found = json.loads(result.stdout)["variants"][0]["calibration"]
    assert (found["n"], found["ece"]) == (40, pytest.approx(0.22))
    assert found["temperature"] > 2, "three of four are right, not 97 of 100"
    keys = _own_keys(json.loads((run / "manifest.json").read_text()), None)
    assert keys["petool_lite.temperature"] == str(found["temperature"])


def test_hostile_replies_are_text_entries_are_filtered_and_it_fits_a_phone_and_a_desk(opened, tmp_path) -> None:
    """Two variants, 40 entries each; the replies of one are hostile where they are wrong."""
    replies = [answer(entry) if index % 2 else HOSTILE[index % 6] for index, entry in enumerate(ENTRIES)]
    made = [row(entry, index, reply) for index, (entry, reply) in enumerate(zip(ENTRIES, replies, strict=True))]
    data = {"source": "<img src=x onerror=window.pwned=1>", "sha256": "ab" * 32, "total": 40}
    write_results(tmp_path, made, started="1", data=data)
    base = [row(entry, index, answer(entry), variant="base<i onclick=x>") for index, entry in enumerate(ENTRIES)]
    write_results(tmp_path, base, started="2", model_bytes=270_000_000, data=data)
    write_report(tmp_path)
    page = opened((tmp_path / "report.html").as_uri())
    count, shown = page.locator("#count"), page.locator(".entry:visible")
    assert count.inner_text() == "40 of 40 entries"
    page.check("#wrong")
    assert shown.count() == 20
    shown.first.locator("summary").click()
    assert HOSTILE[0] in shown.first.inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    page.check("#differ")
    assert count.inner_text() == "20 of 40 entries"
    page.fill("#words", "nothing has this text")
    assert count.inner_text() == "0 of 40 entries"
    for width in (420, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".chart:visible").count() == 2
        ends = [cell.bounding_box() for cell in page.locator("#scores th:visible").all()]
        assert max(end["x"] + end["width"] for end in ends) <= width, "both right is seen on a phone, too"

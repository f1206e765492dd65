"""Every form of file is read; anything else is refused in words; what one command writes another reads."""

import codecs
import gzip
import json
import zipfile

import pytest
from support_published import published_rows

from petool_lite.data.files import load_corpus, load_dataset, write_folds
from petool_lite.errors import PetoolError


def test_json_lines_zip_and_gzip_hold_the_same_entries(tmp_path) -> None:
    rows = published_rows("test", 4)
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "bom.jsonl").write_bytes(codecs.BOM_UTF8 + lines.replace("\n", "\r\n").encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with zipfile.ZipFile(tmp_path / "a.json.zip", "w") as archive:
        archive.writestr("a.json", json.dumps(rows))
    names = ("a.json", "a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.json.zip")
    read = [load_dataset(str(tmp_path / name)).entries for name in names]
    assert all(entries == read[0] for entries in read)
    assert len(read[0]) == 4


def test_a_line_ends_at_a_line_feed_alone(tmp_path) -> None:
    rows = [{**row, "query": f"{row['query']}\u2028\u2029\x85\x0c\x1c\vThanks."} for row in published_rows("train", 40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    files = write_folds(str(tmp_path / "rows.json"), "rating", 2, 0, tmp_path / "folds")
    read = [entry for name in files if "test" in name.name for entry in load_dataset(str(name)).entries]
    assert sorted(entry.query for entry in read) == sorted(row["query"] for row in rows)


def test_a_file_of_another_shape_is_refused(tmp_path) -> None:
    for content, said in (
        ("x".encode("utf-16"), "UTF-16"),
        (b'["\xff"]', r"not UTF-8 text \(byte 2\)"),
        (b"{", "not JSON"),
        (b"3", "not a list"),
        (b"[]", "is empty"),
        (codecs.BOM_UTF8 + b" \n", "is empty"),
        (b"[3]", "entry 0"),
        (b'{"query": "a"}\n{"query": ', "line 2"),
        (b"[" * 100_000, "nested too deep"),
        (b"\x1f\x8bnot gzip", "cannot unpack"),
        (b"\x1f\x8b" + b"\0" * 18, "cannot unpack"),
        (b"PK\x05\x06" + b"\0" * 18, "holds 0 JSON files"),
        (gzip.compress(bytes(80 << 20)), r"unpacks [\d,]+ bytes to"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'[{"a": 1}]', "OpenAI messages with tools"),
        (json.dumps(published_rows("test", 1) * 2).encode(), "found 0 again"),
    ):
        path = tmp_path / "bad.json"
        path.write_bytes(content)
        with pytest.raises(PetoolError, match=said):
            load_dataset(str(path))


def test_a_corpus_is_calls_and_tool_lists_in_any_form_and_nothing_else(tmp_path) -> None:
    tool = {"name": "a", "parameters": {"type": "object"}}
    listed = [[tool], {"tools": [tool]}, {"result": {"tools": [tool]}}, [{"type": "function", "function": tool}]]
    for number, value in enumerate(listed):
        (tmp_path / f"{number}.json").write_text(json.dumps(value))
        assert [found.name for found in load_corpus([tmp_path / f"{number}.json"])[1]] == ["a"]
    for value in (3, "x", None, {}, [], {"tools": 3}):
        (tmp_path / "odd.json").write_text(json.dumps(value))
        with pytest.raises(PetoolError):
            load_corpus([tmp_path / "odd.json"])

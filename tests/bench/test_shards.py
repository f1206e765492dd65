"""Shards and their merge."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from petool_lite.bench.engines import Task
from petool_lite.bench.results import load_folder, merge_shards, shard_folder
from petool_lite.bench.run import bench, generate
from petool_lite.bench.variants import rule_variant

from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError

TIMES = ("prefill_s", "decode_s", "seconds", "cold", "cached_tokens")


def lines_of(path: Path) -> list[str]:
    """The file's lines in the order of the data, without times and what was reused."""
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    rows.sort(key=lambda row: row["index"])
    return [json.dumps({key: value for key, value in row.items() if key not in TIMES}) for row in rows]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with everything and three shards of 7 entries, by two rules."""
    root = tmp_path_factory.mktemp("shards")
    task = Task(load_dataset("demo:test:7"), 8)
    variants = [rule_variant("rule-first"), rule_variant("rule-random")]
    generate(variants, task, root / "whole")
    for place in range(3):
        assert bench(variants, replace(task, shard=(place, 3)), root) is None, "a shard has no report"
    return root


def parts(root: Path) -> list[Path]:
    return [shard_folder(root, (place, 3)) for place in range(3)]


def test_merged_shards_are_what_one_command_makes(shards, tmp_path) -> None:
    merge_shards(parts(shards)[::-1], tmp_path / "merged")
    for name in ("results-rule-first.jsonl", "results-rule-random.jsonl"):
        assert lines_of(tmp_path / "merged" / name) == lines_of(shards / "whole" / name)
        rows = (tmp_path / "merged" / name).read_text().split("\n")
        assert [json.loads(row)["index"] for row in rows if row] == list(range(7))
    merged, whole = load_folder(tmp_path / "merged"), load_folder(shards / "whole")
    for one, other in zip(merged, whole, strict=True):
        for key in ("variant", "entries", "complete", "model_sha256", "data", "shard", "limit", "max_reply_tokens"):
            assert one.meta[key] == other.meta[key]
        assert one.meta["shards"] == 3


def test_shards_that_do_not_fit_are_named_and_nothing_is_written(shards, tmp_path) -> None:
    merged, folders = tmp_path / "merged", []
    for place, path in enumerate(parts(shards)):
        folders.append(shutil.copytree(path, tmp_path / f"s{place}"))
    file = folders[1] / "results-rule-first.meta.json"
    right = json.loads(file.read_text())
    for values, words in (
        ({"complete": False}, "s1/results-rule-first.jsonl is not finished: 2 of 2 entries"),
        ({"shard": [0, 3]}, "not all shards of one bench.*s1/results-rule-first.jsonl is shard 0/3"),
        ({"model_sha256": "0" * 64}, "another model"),
        ({"commit": "other"}, "another commit"),
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
    with pytest.raises(PetoolError, match=r"s2 has no results-rule-first\.jsonl"):
        merge_shards(folders, merged)
    assert not merged.exists()

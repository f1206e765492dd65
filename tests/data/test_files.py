"""Every form of file is read; anything else is refused in words."""

import json
import zipfile

import pytest

from petool_lite.data.demo import generate
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError


def test_json_lines_and_zip_hold_the_same_entries(tmp_path) -> None:
    rows = generate("test", 4)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with zipfile.ZipFile(tmp_path / "a.json.zip", "w") as archive:
        archive.writestr("a.json", json.dumps(rows))
    read = [load_dataset(str(tmp_path / name), "rating") for name in ("a.json", "a.jsonl", "a.json.zip")]
    assert read[0].entries == read[1].entries == read[2].entries == load_dataset("demo:test:4", "rating").entries


def test_a_limit_keeps_the_total() -> None:
    dataset = load_dataset("demo:test:9", "rating", limit=2)
    assert (len(dataset.entries), dataset.total) == (2, 9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{", "not JSON"),
        (b"3", "not a list"),
        (b"[]", "is empty"),
        (b" \n", "is empty"),
        (b"[3]", "entry 0"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, content, said) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(PetoolError, match=said):
        load_dataset(str(path), "rating")


def test_a_repeated_id_is_refused(tmp_path) -> None:
    row = generate("test", 1)[0]
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([row, row]))
    with pytest.raises(PetoolError, match="more than once"):
        load_dataset(str(path), "rating")


@pytest.mark.parametrize("source", ["nowhere.json", "demo:other:3", "demo:train:0", "hub:one/two"])
def test_a_source_that_is_not_there_is_refused(source) -> None:
    with pytest.raises(PetoolError) as error:
        load_dataset(source, "rating")
    assert error.value.hint


def test_the_hub_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(PetoolError, match="cannot download hub:travisxu/PEToolBench"):
        load_dataset("hub:travisxu/PEToolBench/user_entries_sft_r.json", "rating")

"""`petool-lite data` as a user runs it, on published rows and on OpenAI lines."""

import json

import pytest
from support_published import published_rows, training_row


@pytest.fixture
def files(tmp_path):
    for split, count in (("train", 40), ("test", 20)):
        (tmp_path / f"{split}.json").write_text(json.dumps(published_rows(split, count)))
    return tmp_path


def test_stats_count_tokens_in_each_style(command, found, files) -> None:
    stats = found("data", "stats", "test.json", cwd=files)
    assert (stats["entries"], stats["with_answer"], stats["functions"]) == (20, 20, 4)
    assert (stats["tools"]["max"], stats["liked_percent"]) == (4, 33.3)
    assert 0 < stats["tokens_petool"]["median"] < stats["tokens_published"]["median"]
    assert "tokens petool" in command("data", "stats", "demo:test:5").stdout


def test_check_finds_planted_faults_and_leaks(command, files) -> None:
    good = command("data", "check", "train.json", "test.json", cwd=files)
    assert good.returncode == 0, good.stderr
    assert "60 entries, no faults, no leaks" in good.stdout
    assert "providers of tools, by <category>.<provider>.<api>: 160" in good.stdout
    train, test = published_rows("train", 1), published_rows("test", 20)
    (files / "leaky.json").write_text(json.dumps([*test, {**train[0], "entry_id": 99}]))
    test[3]["api_call_ground_truth"]["parameters"] = {"colour": "red"}
    (files / "odd.json").write_text(json.dumps(test))
    told = "entry 3: it gives colour, which its tool does not declare"
    for line, said in ((["train.json", "leaky.json"], "leak, functions"), (["odd.json"], told)):
        found = command("data", "check", *line, cwd=files)
        assert (found.returncode, said in found.stdout) == (1, True)


def test_convert_writes_openai_lines_that_are_the_same_entries(command, found, files) -> None:
    (files / "rows.json").write_text(json.dumps([training_row(row) for row in published_rows("train", 3)]))
    made = found("data", "convert", "rows.json", "lines.jsonl", cwd=files)
    assert made == {"file": "lines.jsonl", "entries": 3, "left_out": []}
    lines = [json.loads(line) for line in (files / "lines.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in lines[0]["messages"]] == ["user", "assistant", "tool"] * 3 + ["user", "assistant"]
    assert [turn["content"] for turn in lines[0]["messages"] if turn["role"] == "tool"] == ["disliked"] * 2 + ["liked"]
    stats = [found("data", "stats", name, cwd=files) for name in ("rows.json", "lines.jsonl")]
    assert stats[0]["tokens_petool"] == stats[1]["tokens_petool"]
    again = command("data", "convert", "rows.json", "lines.jsonl", cwd=files)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)


def test_convert_names_answers_that_are_not_of_their_schema(command, files) -> None:
    rows = published_rows("train", 3)
    rows[1]["api_call_ground_truth"]["parameters"]["limit"] = "ten"
    (files / "rows.json").write_text(json.dumps(rows))
    refused = command("data", "convert", "rows.json", "lines.jsonl", cwd=files)
    assert (refused.returncode, "entry 1, limit: 'ten' is not of type 'number'" in refused.stderr) == (1, True)
    result = command("data", "convert", "rows.json", "lines.jsonl", "--skip-bad", cwd=files)
    assert "left out: rows.json, entry 1, limit" in result.stderr
    assert command("data", "check", "lines.jsonl", cwd=files).returncode == 0


def test_preview_shows_the_loss_mask_of_a_training_row(command, files) -> None:
    row = published_rows("train", 3)[2]
    more = ["--set", "data.train=train.json", "--set", "model.max_tokens=4096"]
    shown = json.loads(command("data", "preview", "demo", *more, "--entry", "2", "--json", cwd=files).stdout)
    call = row["api_call_ground_truth"]
    wanted = json.dumps({"name": call["tool_name"], "arguments": call["parameters"]})
    learned = "".join(piece["text"] for piece in shown["pieces"] if piece["learned"])
    assert learned == f"<tool_call>\n{wanted}\n</tool_call><|im_end|>"
    assert shown["pieces"][0]["text"].endswith(f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n")
    plain = command("data", "preview", "demo")
    assert ("with loss" in plain.stderr, "<|im_end|>" in plain.stdout) == (True, True)

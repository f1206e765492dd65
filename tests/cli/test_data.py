"""`petool-lite data` as a user runs it."""

import json

from petool_lite.data.demo import generate


def test_stats_count_tokens_in_each_style(command) -> None:
    result = command("data", "stats", "demo:test:30", "--json")
    found = json.loads(result.stdout)
    assert (found["entries"], found["with_answer"]) == (30, 30)
    assert found["candidates"]["max"] == 4
    assert found["liked_percent"] == 33.3
    assert found["tokens_compact"]["median"] < found["tokens_published"]["median"]
    assert "tokens published" in command("data", "stats", "demo:test:5").stdout


def test_check_finds_planted_faults_and_leaks(command, tmp_path) -> None:
    train, test = generate("train", 40), generate("test", 20)
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    good = command("data", "check", "train.json", "test.json", cwd=tmp_path)
    assert (good.returncode, "60 entries, no faults, no leaks" in good.stdout) == (0, True), good.stderr
    (tmp_path / "leaky.json").write_text(json.dumps([*test, {**train[0], "entry_id": 99}]))
    leaky = command("data", "check", "train.json", "leaky.json", cwd=tmp_path)
    assert leaky.returncode == 1
    assert "leak, functions" in leaky.stdout
    test[3]["api_call_ground_truth"]["parameters"] = {"colour": "red"}
    (tmp_path / "odd.json").write_text(json.dumps(test))
    odd = command("data", "check", "odd.json", cwd=tmp_path)
    assert odd.returncode == 1
    assert "entry 3: the answer gives colour, which its tool does not declare" in odd.stdout


def test_check_looks_at_what_a_recipe_makes_of_the_training_entries(command, tmp_path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(generate("train", 30)))
    test = generate("test", 10)
    (tmp_path / "test.json").write_text(json.dumps(test))
    made = json.loads(
        command("data", "check", "train.json", "test.json", "--recipe", "smol-rating", "--json", cwd=tmp_path).stdout
    )
    assert made["entries"][0] > 90, "the entries, and what is made of each"
    assert [kind["count"] for kind in made["leaks"].values()] == [0, 0, 0]
    (tmp_path / "leaky.json").write_text(json.dumps([*generate("train", 30), {**test[0], "entry_id": 99}]))
    leaky = command("data", "check", "leaky.json", "test.json", "--recipe", "smol-rating", cwd=tmp_path)
    assert leaky.returncode == 1
    assert "leak, gold tools" in leaky.stdout


def test_split_writes_folds_without_leaks(command, tmp_path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(generate("train", 90)))
    result = command("data", "split", "all.json", "--folds", "3", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = {item["file"]: item["entries"] for item in json.loads(result.stdout)}
    assert len(files) == 6
    assert all(files[f"folds/fold{n}-train.jsonl"] + files[f"folds/fold{n}-test.jsonl"] == 90 for n in range(3))
    for number in range(3):
        pair = [f"folds/fold{number}-{name}.jsonl" for name in ("train", "test")]
        assert command("data", "check", *pair, cwd=tmp_path).returncode == 0


def test_preview_shows_the_loss_mask_and_the_three_prompts(command) -> None:
    shown = json.loads(command("data", "preview", "demo", "--entry", "2", "--json").stdout)
    row = generate("train", 3)[2]
    assert "".join(shown["answer"]) == json.dumps(row["api_call_ground_truth"]) + "<|im_end|>"
    assert f"<|im_start|>user\n{row['query']}\nLikely: " in shown["prompt"]
    assert shown["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    plain = command("data", "preview", "demo")
    assert "with loss" in plain.stderr
    assert "<|im_end|>" in plain.stdout
    three = json.loads(command("data", "preview", "demo", "--settings", "--json").stdout)
    assert [title.split(",")[0] for title in three] == ["rating", "preferred", "chronological"]

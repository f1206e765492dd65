"""An export sent to a stand-in Hub on 127.0.0.1: one commit with scores that the Hub reads, or one line."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support_bench import answer, answering, called, row, write_results

from petool_lite.bench.report import write_report
from petool_lite.export.hub import card
from petool_lite.models import Base

# The Hub's address is read when its client is imported, so every call has a process of its own.
PROGRAM = """
import sys
from pathlib import Path
from petool_lite.console import silent
from petool_lite.errors import PetoolError
from petool_lite.export.hub import check_push, push
run = Path(sys.argv[1])
try:
    check_push(sys.argv[2])
    print(push(run / "export", run, sys.argv[2], silent))
except PetoolError as error:
    print(error.message, "|", error.hint)
"""


@pytest.fixture
def hub() -> Iterator[dict[str, Any]]:
    """What was sent to it: `files` by name, `made` repositories, its `address`; `broken` fails the commit."""
    found: dict[str, Any] = {"files": {}, "made": [], "broken": False}

    def value(path, headers, raw) -> tuple[int, Any]:
        model = f"{found['address']}/ann/model"
        if not raw:
            known = headers.get("Authorization") == "Bearer secret"
            return (200, {"name": "ann", "type": "user"}) if known else (401, {"error": "who?"})
        if path.endswith("/repos/create"):
            found["made"].append(json.loads(raw))
            return 200, {"url": model}
        if "/preupload/" in path:
            names = [item["path"] for item in json.loads(raw)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path and not found["broken"]:
            sent = [line["value"] for line in map(json.loads, raw.splitlines()) if line["key"] == "file"]
            found["files"] |= {item["path"]: base64.b64decode(item["content"]) for item in sent}
            return 200, {"commitUrl": f"{model}/commit/1", "commitOid": "1" * 40, "success": True}
        return 200 if "validate-yaml" in path else 403, {"errors": [], "warnings": []}

    def reply(*request) -> tuple[int, dict[str, str], bytes]:
        status, told = value(*request)
        return status, {"Content-Type": "application/json"}, json.dumps(told).encode()

    with answering(reply) as found["address"]:
        yield found


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with an export and the scores of its tuned model on the published entries, as its report has them."""
    run = tmp_path / "one"
    (run / "export").mkdir(parents=True)
    (run / "recipe.toml").write_text("[model]\n")
    rows = [row(entry, index, answer(entry)) for index, entry in enumerate(called(4))]
    write_results(run / "bench", rows)
    write_report(run / "bench")
    report = json.loads((run / "bench" / "report.json").read_text())
    report["variants"][0] |= {"published_data": True, "partial": []}
    (run / "bench" / "report.json").write_text(json.dumps(report))
    for name in ("model.q4_k_m.gguf", "Modelfile", "README.md"):
        (run / "export" / name).write_text(name)
    (run / "export" / "export.json").write_text(json.dumps({"files": [{"file": "model.q4_k_m.gguf"}]}))
    return run


def pushed(hub: dict[str, Any], run: Path, repo: str, token: str = "secret") -> str:  # pragma: allowlist secret
    own = {"HF_ENDPOINT": hub["address"], "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(run / "hf")}
    line = [sys.executable, "-c", PROGRAM, run, repo]
    result = subprocess.run(line, env=os.environ | own, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_an_export_is_one_commit_with_its_scores(hub, run) -> None:
    assert pushed(hub, run, "ann/model") == f"{hub['address']}/ann/model"
    evaluated = ".eval_results/petoolbench-rating-tuned.yaml"
    assert set(hub["files"]) == {"model.q4_k_m.gguf", "Modelfile", "README.md", "export.json", evaluated}
    entries = yaml.safe_load(hub["files"][evaluated])
    assert entries[0]["dataset"] == {"id": "travisxu/PEToolBench", "task_id": "rating_tool_acc"}
    assert [entry["value"] for entry in entries] == [100.0, 100.0, 100.0]
    assert hub["made"][0]["name"] == "model"


def test_what_cannot_be_pushed_is_one_line_and_leaves_nothing(hub, run) -> None:
    assert "not a place on the Hub: model" in pushed(hub, run, "model")
    assert "the Hub does not know you" in pushed(hub, run, "ann/model", "wrong")
    assert hub["made"] == []
    hub["broken"] = True
    assert "the export is not on the Hub" in pushed(hub, run, "ann/model")
    assert hub["files"] == {}


def test_the_cards_head_is_what_the_hub_reads(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.export.hub.licence", lambda base: "apache-2.0")
    document = {
        "versions": {}, "files": [], "method": "full", "changed_tensors": 1, "tensors": 1, "relative_change": 0.1,
        "checks": {}, "model_sha256": "0",
    }  # fmt: skip
    data = {"kept": 1, "source": "x", "sha256": "0", "tokens": 1}
    manifest = {"setting": "rating", "prompt_style": "published", "data": data}
    text = card(run, Base("ann/base", tmp_path, None), manifest, document)
    assert ("### Scores by the published scorer" in text, "1 of 1 trained tensors changed" in text) == (True, True)
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["license"], head["library_name"]) == ("ann/base", "apache-2.0", "gguf")
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {"name": "PEToolBench", "type": "travisxu/PEToolBench", "config": "rating"}
    assert [metric["value"] for metric in result["metrics"]] == [100.0, 100.0, 100.0]

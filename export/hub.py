"""An export on the Hub: its scores as metadata that the Hub reads, and its files, sent in one commit."""

import json
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import USAGE, PetoolError, first_line
from petool_lite.models import is_hub_id
from petool_lite.places import library_places

_DATA = "travisxu/PEToolBench"
_METRICS = {"tool_acc": "tool accuracy", "param_acc": "parameter accuracy", "joint_acc": "tool and parameters"}
_EVAL = ".eval_results"


def scored(run: Path) -> list[dict[str, Any]]:
    """The variants of a run's report that are what it trained, scored on all of their data."""
    file = run / "bench" / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    found = report.get("variants", []) if report.get("schema") == 4 else []
    return [item for item in found if item["name"].startswith("tuned") and not item["partial"]]


def _published(item: dict[str, Any]) -> bool:
    return bool(item["published_data"])


def card_data(run: Path, base: str, licence: str) -> Any:
    """The head of a run's model card, a huggingface_hub.ModelCardData, with its scores as `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            task_name=f"tool calls ({item['name']})",
            dataset_type=_DATA if _published(item) else "local",
            dataset_name="PEToolBench" if _published(item) else Path(item["data"]["source"]).name,
            dataset_config=item["setting"],
            metric_type="accuracy",
            metric_name=f"{metric}, {item['scorer']} scorer, {item['n']:,} entries, in percent",
            metric_value=round(item[key], 2),
        )
        for item in scored(run)
        for key, metric in _METRICS.items()
    ]
    about = {"license": licence or "other", "library_name": "gguf", "tags": ["tool-calling", "petool-lite", "gguf"]}
    named = base if is_hub_id(base) else None
    return ModelCardData(base_model=named, **about, model_name=run.name, eval_results=results or None)


def eval_results(run: Path) -> dict[str, str]:
    """Files for `.eval_results`, name -> YAML: only scores on the published test entries, whose data set is there."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    found = {}
    for item in filter(_published, scored(run)):
        name, notes = f"petoolbench-{item['setting']}-{item['name']}.yaml", f"{item['scorer']} scorer, n {item['n']}"
        entries = [EvalResultEntry(_DATA, f"{item['setting']}_{key}", item[key], notes=notes) for key in _METRICS]
        found[name] = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return found


def check_push(repo: str) -> None:
    """Raise PetoolError, before any work, where nothing could be pushed to `repo`: no OWNER/NAME, or no token."""
    if not is_hub_id(repo):
        raise PetoolError(f"not a place on the Hub: {repo[:100]}", "give OWNER/NAME", USAGE)
    library_places()
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise PetoolError(
            f"the Hub does not know you ({first_line(error)})", "run `hf auth login`, or set HF_TOKEN"
        ) from error


def push(folder: Path, run: Path, repo: str, report: Report) -> str:
    """Send the files of an export folder to the model `repo`, made private where it is new; returns its address. All of
    them are one commit: a transfer that breaks off leaves the Hub as it was. Raises PetoolError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    listed = [item["file"] for item in json.loads((folder / "export.json").read_text())["files"]]
    files = [*listed, "Modelfile", "README.md", "export.json"]
    parts = [CommitOperationAdd(name, str(folder / name)) for name in files]
    parts += [CommitOperationAdd(f"{_EVAL}/{name}", text.encode()) for name, text in eval_results(run).items()]
    report(f"sending {len(parts)} files to {repo}", 0, 0, "")
    try:
        api = HfApi()
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        api.create_commit(repo, parts, commit_message=f"Export of the run {run.name}")
    except Exception as error:  # as above
        what = f"the export is not on the Hub: {first_line(error)}"
        raise PetoolError(what, f"the files are in {folder}; the same command sends them again") from error
    return address

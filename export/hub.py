"""The model card of an export, Ollama's Modelfile, and the way to the Hub: its scores, and its files in one commit."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.errors import USAGE, PetoolError, in_words
from petool_lite.families import end_tokens
from petool_lite.gguf_base import gguf_fields, open_gguf
from petool_lite.models import Base, is_hub_id
from petool_lite.places import library_places
from petool_lite.recipe import ALL

_DATA = "travisxu/PEToolBench"
_UNSCORED = "## Scores\n\nNot scored yet: `petool-lite bench`, then export again.\n"
_METRICS = {"tool_acc": "tool accuracy", "param_acc": "parameter accuracy", "joint_acc": "tool and parameters"}


def scored(run: Path) -> list[dict[str, Any]]:
    """The variants of a run's report that are what it trained, scored on all of their data."""
    file = run / "bench" / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    found = report.get("variants", []) if report.get("schema") == 4 else []
    return [item for item in found if item["name"].startswith("tuned") and not item["partial"]]


def card_data(run: Path, base: str, licence: str) -> Any:
    """The head of a run's model card, a huggingface_hub.ModelCardData, with its scores as `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            task_name=f"tool calls ({item['name']})",
            dataset_type=_DATA if item["published_data"] else "local",
            dataset_name="PEToolBench" if item["published_data"] else Path(item["data"]["source"]).name,
            dataset_config=item["setting"],
            metric_type="accuracy",
            metric_name=f"{metric}, {item['scorer']} scorer, {item['n']:,} entries, in percent",
            metric_value=round(item[key], 2),
        )
        for item in scored(run)
        for key, metric in _METRICS.items()
    ]
    about: dict[str, Any] = {"tags": ["tool-calling", "petool-lite", "gguf"], "library_name": "gguf"}
    about |= {"license": licence or "other", "base_model": base if is_hub_id(base) else None, "model_name": run.name}
    return ModelCardData(**about, eval_results=results or None)


def eval_results(run: Path) -> dict[str, str]:
    """Files for `.eval_results`, name -> YAML: only scores on the published test entries, whose data set is there."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    found = {}
    for item in (item for item in scored(run) if item["published_data"]):
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

    # the hub client raises many kinds; each means the same to the user
    with in_words("the Hub does not know you", "run `hf auth login`, or set HF_TOKEN", Exception):
        HfApi().whoami()


def push(folder: Path, run: Path, repo: str, report: Report) -> str:
    """Send the files of an export folder to the model `repo`, made private where it is new; returns its address. All of
    them are one commit: a transfer that breaks off leaves the Hub as it was. Raises PetoolError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [item["file"] for item in json.loads((folder / "export.json").read_text())["files"]]
    parts = [CommitOperationAdd(name, str(folder / name)) for name in [*files, "Modelfile", "README.md", "export.json"]]
    parts += [CommitOperationAdd(f".eval_results/{name}", text.encode()) for name, text in eval_results(run).items()]
    report(f"sending {len(parts)} files to {repo}", 0, 0, "")
    hint = f"the files are in {folder}; the same command sends them again"
    with in_words("the export is not on the Hub", hint, Exception):
        address = str(HfApi().create_repo(repo, private=True, exist_ok=True))
        HfApi().create_commit(repo, parts, commit_message=f"Export of the run {run.name}")
    return address


def card(run: Path, base: Base, manifest: dict[str, Any], document: dict[str, Any]) -> str:
    """The card's text, Markdown with a YAML head that the Hub reads. `document` is the content of export.json."""
    from jinja2 import Environment

    known, report = licence(base), run / "bench" / "report.md"
    page = resources.files("petool_lite.export").joinpath("card.md").read_text(encoding="utf-8")
    text = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(page).render(
        head=card_data(run, base.name, known).to_yaml(),
        **{"name": run.name, "base": base.name, "licence": known, "figures": figures},
        **{"manifest": manifest, "document": document},
        setting="all settings" if manifest["setting"] == ALL else f"{manifest['setting']} setting",
        scores=report.read_text().replace("# ", "## ") if report.is_file() else _UNSCORED,
        recipe=(run / "recipe.toml").read_text().strip(),
    )  # fmt: skip
    return str(text)


def figures(checks: Mapping[str, Any]) -> list[str]:
    """What was found of one file, in words."""
    words = {
        "prompts_with_equal_ids": "{prompts_with_equal_ids} prompts with equal ids",
        "replies": "{replies_stopped} of {replies} replies stop",
        "against_transformers": "top-1 agreement with the merged model {against_transformers[top1]:.1%}, "
        "KL {against_transformers[kl]:.3g}",
    }
    return [text.format(**checks) for key, text in words.items() if key in checks]


def licence(base: Base) -> str:
    """The base's licence as its GGUF or its own card names it, or an empty string."""
    import gguf

    if base.gguf:
        return str(gguf_fields(open_gguf(base.gguf)).get("general.license", ""))
    named = gguf.Metadata.load(None, base.directory).license
    return ", ".join(named) if isinstance(named, list) else named or ""


def modelfile(gguf: str, directory: Path, max_tokens: int) -> str:
    """The Modelfile of `gguf`: greedy, ending as the base does, `max_tokens` of context, and what Ollama cannot do."""
    stops = "".join(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}\n" for token in end_tokens(directory))
    limits = '# Ollama does not run the chat template of the file: it takes whole prompts ("raw": true) and no tools\n'
    return f"FROM ./{gguf}\n{stops}PARAMETER temperature 0\nPARAMETER num_ctx {max_tokens}\n{limits}"

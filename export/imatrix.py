"""An importance matrix from the recipe's own training rows: mean squared inputs of every matrix in the layers."""

from typing import Any

from petool_lite.export.reference import Reference
from petool_lite.export.source import Source

from petool_lite.console import Report
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import chat_from_directory
from petool_lite.recipe import Recipe

TOKENS = 32_768  # of training rows, prompts and answers


def importance(source: Source, recipe: Recipe, report: Report) -> dict[str, Any]:
    """GGUF tensor name -> float32 array (columns,)."""
    prepared = prepare(recipe, source.base, chat_from_directory(source.base.directory), report)
    step = max(1, prepared.summary["tokens"] // TOKENS)
    return Reference(source).mean_squares(prepared.table["input_ids"][::step], report)  # from all over the data

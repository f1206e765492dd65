"""An importance matrix from the recipe's own training rows: mean squared inputs of every matrix in the layers.

Saved as llama.cpp's GGUF imatrix, which its tools read.
"""

from pathlib import Path
from typing import Any

from petool_lite.export.gguf import save
from petool_lite.export.reference import Reference
from petool_lite.export.source import Source

from petool_lite.console import Report
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import chat_from_directory
from petool_lite.recipe import Recipe
from petool_lite.runs import draft

TOKENS = 32_768  # of training rows, prompts and answers


def importance(source: Source, recipe: Recipe, path: Path, report: Report) -> dict[str, Any]:
    """GGUF tensor name -> float32 array (columns,); also saved to `path`."""
    import numpy as np

    prepared = prepare(recipe, source.base, chat_from_directory(source.base.directory), report)
    step = max(1, prepared.summary["tokens"] // TOKENS)
    rows = [list(row) for row in prepared.table["input_ids"][::step]]  # from all over the data
    sums = Reference(source).input_squares(rows, report)
    with draft(path) as work:
        _save(work, sums, recipe.data.train, len(rows))
    # divided in float32, as llama.cpp does when it reads such a file
    return {name: values / np.float32(count) for name, (values, count) in sums.items()}


def _save(path: Path, sums: dict[str, tuple[Any, int]], data: str, rows: int) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # an imatrix has a type only
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [data])
    writer.add_uint32("imatrix.chunk_count", rows)
    writer.add_uint32("imatrix.chunk_size", max(1, next(iter(sums.values()))[1] // rows))
    for name in sorted(sums):
        values, count = sums[name]
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    save(writer)

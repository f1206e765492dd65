"""An importance matrix from the recipe's own training rows: mean squared inputs of every matrix in the layers.

Saved as llama.cpp's GGUF imatrix (its tools read it) and used again while weights, data and base stay the same.
"""

import hashlib
from pathlib import Path
from typing import Any

from petool_lite.export.gguf import save
from petool_lite.export.reference import Reference
from petool_lite.export.source import Source

from petool_lite.console import Report
from petool_lite.gguf_base import open_gguf
from petool_lite.models import file_sha256, weights_sha256
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import chat_from_directory
from petool_lite.recipe import Recipe
from petool_lite.runs import TRAINED, draft

TOKENS = 32_768  # of training rows, prompts and answers
_KEY = "petool_lite.imatrix_source"


def importance(source: Source, run: Path, recipe: Recipe, path: Path, report: Report) -> dict[str, Any]:
    """GGUF tensor name -> float32 array (columns,); read from `path` if it is of this run, else measured and saved."""
    import numpy as np

    identity = _identity(source, run, recipe)
    found = _load(path, identity) if path.is_file() else None
    if found is not None:
        report(f"using {path.name} again", 0, 0, "")
        return found
    prepared = prepare(recipe, source.base, chat_from_directory(source.base.directory), report)
    rows = _spread(prepared.table["input_ids"])
    sums = Reference(source).input_squares(rows, report)
    with draft(path) as work:
        _save(work, sums, identity, recipe.data.train, len(rows))
    # divided in float32, as llama.cpp does when it reads such a file
    return {name: values / np.float32(count) for name, (values, count) in sums.items()}


def _identity(source: Source, run: Path, recipe: Recipe) -> str:
    facts = [file_sha256(run / "recipe.toml"), weights_sha256(run / TRAINED[recipe.train.method])]
    facts += [str(source.base.directory), str(source.nf4), str(recipe.data), str(TOKENS)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _spread(rows: Any) -> list[list[int]]:
    """Rows from all over the data, about TOKENS tokens of them."""
    total = sum(len(row) for row in rows)
    step = max(1, total // TOKENS)
    return [list(row) for row in rows[::step]]


def _save(path: Path, sums: dict[str, tuple[Any, int]], identity: str, data: str, rows: int) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # an imatrix has a type only
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [data])
    writer.add_uint32("imatrix.chunk_count", rows)
    writer.add_uint32("imatrix.chunk_size", max(1, next(iter(sums.values()))[1] // rows))
    writer.add_string(_KEY, identity)
    for name in sorted(sums):
        values, count = sums[name]
        writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    save(writer)


def _load(path: Path, identity: str) -> dict[str, Any] | None:
    """The file's means, or None if it was made from something else."""
    import numpy as np

    reader = open_gguf(path)
    if _KEY not in reader.fields or reader.fields[_KEY].contents() != identity:
        return None
    values = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    names = [name.removesuffix(".in_sum2") for name in values if name.endswith(".in_sum2")]
    return {name: values[f"{name}.in_sum2"] / values[f"{name}.counts"] for name in names}

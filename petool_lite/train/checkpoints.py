"""Checkpoints of a run: what --resume continues from."""

from pathlib import Path


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    folders = [path for path in (run / "checkpoints").glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(folders, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

"""`train`: a recipe becomes a LoRA adapter, or a model of its own, in a run directory."""

from petool_lite.train.devices import is_first
from petool_lite.train.memory import dry_run, plan
from petool_lite.train.run import train

__all__ = ["dry_run", "is_first", "plan", "train"]

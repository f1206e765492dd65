"""`export`: adapter + base, or a model of its own -> GGUF files in one pass over the weights, then checked."""

from petool_lite.export.run import Options, export_base, export_run, write_targets
from petool_lite.export.source import check_exportable, load_source, load_whole

__all__ = ["Options", "check_exportable", "export_base", "export_run", "load_source", "load_whole", "write_targets"]

"""petool-lite: fine-tune a small model to call the tool its user prefers, and run it offline on a CPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petool_lite.inference.call import ToolCaller

__all__ = ["ToolCaller"]


def __getattr__(name: str) -> Any:
    # On first use, so that `import petool_lite` stays cheap.
    if name == "ToolCaller":
        from petool_lite.inference.call import ToolCaller

        return ToolCaller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

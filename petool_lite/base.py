"""The name that version 0.1 gave `petool_lite.models`, for scripts that know it."""

from petool_lite.models import Base, resolve_base

__all__ = ["Base", "resolve_base"]

"""Offline inference: token ids in, reply and timings out. llama.cpp on a CPU lives in `llama`."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def bare(package: str, name: str) -> Any:
    """A module of a package without what the package itself imports first, which takes as long as a short call."""
    if f"{package}.{name}" in sys.modules or (spec := find_spec(package)) is None:
        return import_module(f"{package}.{name}")
    empty = ModuleType(package)
    empty.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = empty
    try:
        return import_module(f"{package}.{name}")
    finally:
        del sys.modules[package]  # whoever wants the whole package gets it

"""The one error type that commands turn into a red line, a hint and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

FAILED, USAGE, MACHINE = 1, 2, 3


class PetoolError(Exception):
    """An expected failure: what is wrong, what to do about it, and the exit code: 1 failed, 2 wrong usage, 3 this
    machine cannot do it, 128 + the signal's number (130, 143) stopped by Ctrl-C or SIGTERM with all work saved."""

    def __init__(self, message: str, hint: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code


def first_line(error: BaseException) -> str:
    """The first line of what a library says, or what kind of error it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def in_words(what: str, hint: str, *kinds: type[Exception], exit_code: int = FAILED) -> Iterator[None]:
    """Turn an error of these kinds, but no PetoolError, into one: `what` that means, and why. Raises PetoolError."""
    try:
        yield
    except PetoolError:
        raise
    except kinds as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise PetoolError(f"{what} ({why})", hint, exit_code) from error


def missing_package(error: ModuleNotFoundError | AttributeError) -> PetoolError:
    """What to tell a user whose installation lacks a package, or whose Python lacks what no Windows has."""
    name = (error.name or str(error)).partition(".")[0]
    if sys.platform == "win32" and (isinstance(error, AttributeError) or name in sys.stdlib_module_names):
        return PetoolError(f"this works on Linux and macOS only ({error})", "on Windows use it inside WSL", MACHINE)
    if name == "petool_lite" or isinstance(error, AttributeError):
        raise error  # a fault of our own, whose traceback is wanted
    if name in ("mcp", "mcp_types"):
        return PetoolError("MCP servers need the package mcp", 'pip install "petool-lite[mcp]"', MACHINE)
    hint = 'training and export need: pip install "petool-lite[train]"; where pip finds no versions that fit together: '
    return PetoolError(f"the package {name} is not installed", f"{hint}requirements/install.sh in a checkout", MACHINE)

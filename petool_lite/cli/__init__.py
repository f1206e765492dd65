"""The command line: parses, calls one function a verb, prints. A verb's module is imported when it is called."""

import errno
import signal
import sys
import threading
from importlib import import_module
from typing import Any

import click

from petool_lite.errors import PetoolError, missing_package

_VERBS = {
    "train": "Train a recipe into a new run directory.",
    "export": "Write what a run trained as GGUF files, checked.",
    "bench": "Score models and rules on labelled entries.",
    "call": "Print the tool call for a query.",
    "rate": "Say what the user thinks of a call.",
    "history": "What users did with their tools, and their verdicts.",
    "serve": "Serve a GGUF file to OpenAI clients.",
    "data": "Fetch, look at, check, convert and split entries.",
    "recipes": "Shipped recipes.",
    "runs": "Training runs on this machine.",
    "doctor": "Show what this machine can do.",
}
# What a disk answers that is full, over its quota, read-only or not ours; EFBIG is a limit on the size of files.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
# Steps that may come next, with what they give.
_DEMO = ("petool-lite train demo", "a 135M model on this CPU, about five minutes")
_EXPORT = ("petool-lite export", "one GGUF file, checked; call, serve and bench take it")
_BENCH = ("petool-lite bench", "base against tuned")
_SHOW = ("petool-lite runs show", "what was trained, with which versions")
_CALL = ('petool-lite call "..." --tools tools.json', "one tool call; --explain says why")
_SERVE = ("petool-lite serve", "the same for OpenAI clients, on 127.0.0.1:8080")


class Main(click.Group):
    """Finds verbs, and turns an expected failure into one red line, a hint and an exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The verb of that name, imported now."""
        return getattr(import_module(f"{__name__}.{name}"), name) if name in _VERBS else None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs with a line each, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))

    def invoke(self, context: click.Context) -> Any:
        """Run the chosen command; SIGTERM ends it as Ctrl-C does, so what is half written goes away."""
        ended = list[int]()

        def end(number: int, _: object) -> None:
            ended.append(number)
            raise KeyboardInterrupt

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)
        try:
            return super().invoke(context)
        except PetoolError as error:
            failure = error
        except (ModuleNotFoundError, AttributeError) as error:
            failure = missing_package(error)
        except EOFError as error:  # click would say "Aborted!": a full disk cuts the files that Python compiles
            hint = "if a disk was full: remove the folders __pycache__ of the installation, or install it again"
            failure = PetoolError(f"a file ends too early: {error}", hint)
        except BrokenPipeError:
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(143 if ended else 130)
        except OSError as error:
            if error.errno not in _DISK and error.filename is None:
                raise
            what = "write" if error.errno in _DISK else "use"
            where = f"cannot {what} {str(error.filename or 'a file')[:200]}: {error.strerror}"
            hint = "make room, or give a place that can be written; what was complete is kept"
            failure = PetoolError(where, hint if error.errno in _DISK else "check the path")
        from petool_lite.console import fail

        fail(failure)
        sys.exit(failure.exit_code)


def first_steps() -> list[str]:
    """What no arguments at all are answered with: where this folder stands, what to do next, where to read on."""
    from petool_lite.runs import is_complete, list_runs, state

    runs = list_runs()
    newest = next(filter(is_complete, reversed(runs)), None)
    if newest is not None:
        exported = any((newest / "export").glob("model.*.gguf"))
        where = f"{newest} is trained{' and exported' if exported else ', not exported'}."
        steps = [_BENCH, _CALL, _SERVE] if exported else [_EXPORT, _BENCH, _SHOW]
    elif not runs:
        where = "petool-lite tunes a small model to call the tools its user prefers."
        steps = [("petool-lite doctor", "what this machine can do"), _DEMO, _EXPORT]
    elif state(runs[-1]) == "running":
        where, steps = f"{runs[-1]} is being trained.", [("petool-lite runs list", "what is there"), _EXPORT, _BENCH]
    else:
        where = f"{runs[-1]} was not finished."
        steps = [(f"petool-lite train --resume {runs[-1]}", "go on from its last checkpoint"), _DEMO, _EXPORT]
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command:<{width}}   {meaning}" for command, meaning in steps]
    return [where, *lines, "All commands: petool-lite --help"]


@click.group(cls=Main, invoke_without_command=True, context_settings=_SETTINGS)
@click.version_option(package_name="petool-lite")
@click.pass_context
def main(context: click.Context) -> None:
    """Fine-tune a small model to call the tool its user prefers, export it to GGUF, score it on a CPU.

    \b
    petool-lite train demo                   a 135M model on this machine, about five minutes
    petool-lite export --gguf q4_k_m         one GGUF file
    petool-lite bench                        base against tuned
    petool-lite call "..." --tools T.json    one tool call
    petool-lite rate last liked              what the user thought of it; the next call knows
    petool-lite serve                        an OpenAI-compatible server"""
    if context.invoked_subcommand is None:
        click.echo("\n".join(first_steps()))

"""The command line: parses, calls one function a verb, prints. Nothing heavy is imported before a verb is chosen."""

import errno
import sys
from typing import Any

import click

from petool_lite.cli.bench import bench
from petool_lite.cli.call import call
from petool_lite.cli.data import data
from petool_lite.cli.doctor import doctor
from petool_lite.cli.export import export
from petool_lite.cli.history import history
from petool_lite.cli.rate import rate
from petool_lite.cli.recipes import recipes
from petool_lite.cli.runs import runs
from petool_lite.cli.serve import serve
from petool_lite.cli.train import train
from petool_lite.errors import PetoolError, missing_package

# What a disk answers that is full, over its quota, read-only or not ours; EFBIG is a limit on the size of files.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Main(click.Group):
    """Turns an expected failure into one red line, a hint and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(context)
        except PetoolError as error:
            failure = error
        except ModuleNotFoundError as error:
            failure = missing_package(error)
        except BrokenPipeError:
            sys.exit(1)
        except KeyboardInterrupt:
            from petool_lite.console import say

            say("stopped")
            sys.exit(130)
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


@click.group(cls=Main, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
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
    petool-lite serve                        an OpenAI-compatible server
    """
    if context.invoked_subcommand is None:
        from petool_lite.cli.first_steps import first_steps

        click.echo("\n".join(first_steps()))


for _verb in (train, export, bench, call, rate, history, serve, data, recipes, runs, doctor):
    main.add_command(_verb)

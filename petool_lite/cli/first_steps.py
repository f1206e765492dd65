"""What `petool-lite` without arguments says: the next step from here, read from the runs that are there."""

from petool_lite.runs import is_complete, list_runs, state

_DEMO = ("petool-lite train demo", "a 135M model on this CPU, about five minutes")
_EXPORT = ("petool-lite export", "one GGUF file, checked; call, serve and bench take it")
_BENCH = ("petool-lite bench", "base against tuned")
_SHOW = ("petool-lite runs show", "what was trained, with which versions")
_CALL = ('petool-lite call "..." --tools tools.json', "one tool call; --explain says why")
_SERVE = ("petool-lite serve", "the same for OpenAI clients, on 127.0.0.1:8080")


def first_steps() -> list[str]:
    """Five lines: where this folder stands, what to do next, where to read on."""
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

"""What `petool-lite` without arguments says: the next step from here, read from the runs that are there."""

from petool_lite.runs import is_complete, list_runs, state

_EXPORT = ("petool-lite export", "one GGUF file, checked; call, serve and bench take it")
_BENCH = ("petool-lite bench", "base against tuned")


def first_steps() -> list[str]:
    """Five lines: where this folder stands, what to do next, where to read on."""
    runs = list_runs()
    complete = [run for run in runs if is_complete(run)]
    demo = ("petool-lite train demo", "a 135M model on this CPU, about five minutes")
    if not runs:
        where = "petool-lite tunes a small model to call the tools its user prefers."
        steps = [("petool-lite doctor", "what this machine can do"), demo, _EXPORT]
    elif not complete and state(runs[-1]) == "running":
        where = f"{runs[-1]} is being trained."
        steps = [("petool-lite runs list", "what is there, and how far"), _EXPORT, _BENCH]
    elif not complete:
        where = f"{runs[-1]} was not finished."
        steps = [(f"petool-lite train --resume {runs[-1]}", "go on from its last checkpoint"), demo, _EXPORT]
    elif not any((complete[-1] / "export").glob("model.*.gguf")):
        where = f"{complete[-1]} is trained, not exported."
        steps = [_EXPORT, _BENCH, ("petool-lite runs show", "what was trained, with which versions")]
    else:
        where = f"{complete[-1]} is trained and exported."
        call = ('petool-lite call "..." --tools tools.json', "one tool call; --explain says why")
        steps = [_BENCH, call, ("petool-lite serve", "the same for OpenAI clients, on 127.0.0.1:8080")]
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command:<{width}}   {meaning}" for command, meaning in steps]
    return [where, *lines, "All commands: petool-lite --help"]

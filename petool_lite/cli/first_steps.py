"""What `petool-lite` without arguments says: the next step from here, read from the runs that are there."""

from petool_lite.runs import is_complete, list_runs


def first_steps() -> list[str]:
    """Five lines: where this folder stands, what to do next, where to read on."""
    where, steps = _next()
    width = max(len(command) for command, _ in steps)
    return [
        where,
        *(f"  {command:<{width}}   {meaning}" for command, meaning in steps),
        "All commands: petool-lite --help",
    ]


def _next() -> tuple[str, list[tuple[str, str]]]:
    runs = list_runs()
    complete = [run for run in runs if is_complete(run)]
    if not complete:
        where = (
            f"{runs[-1]} was not finished."
            if runs
            else "petool-lite tunes a small model to call the tools its user prefers."
        )
        first = (f"petool-lite train --resume {runs[-1]}", "go on from its last checkpoint") if runs else None
        steps = [
            ("petool-lite doctor", "what this machine can do"),
            ("petool-lite train demo", "a 135M model on this CPU, about five minutes"),
            ("petool-lite export", "then: one GGUF file, which call, serve and bench take"),
        ]
        return where, [first, *steps[1:]] if first else steps
    run = complete[-1]
    if not any((run / "export").glob("model.*.gguf")):
        steps = [
            ("petool-lite export", "one GGUF file, checked against the merged model"),
            ("petool-lite bench", "then: base against tuned"),
            ("petool-lite runs show", "what was trained, with which versions"),
        ]
        return f"{run} is trained, not exported.", steps
    steps = [
        ("petool-lite bench", "base against tuned"),
        ('petool-lite call "..." --tools tools.json', "one tool call; --explain says why"),
        ("petool-lite serve", "the same for OpenAI clients, on 127.0.0.1:8080"),
    ]
    return f"{run} is trained and exported.", steps

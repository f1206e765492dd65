"""The one error type that commands turn into a red line, a hint and an exit code."""

FAILED, USAGE, MACHINE = 1, 2, 3


class PetoolError(Exception):
    """An expected failure: what is wrong, what to do about it, and the process exit code.

    Exit codes: 1 failed with a clear message, 2 wrong usage, 3 this machine cannot do it, 128 + the signal's number
    (130, 143) stopped by Ctrl-C or SIGTERM with all work saved.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

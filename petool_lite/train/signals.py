"""Ctrl-C and SIGTERM: the first finishes the step and saves, the second leaves at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from petool_lite.console import say_at_once
from petool_lite.errors import PetoolError
from petool_lite.train.devices import is_first

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Which signal asked to stop, if any; `graceful` is set while a training loop looks at it after every step."""

    caught: signal.Signals | None = None
    graceful = False

    @property
    def name(self) -> str:
        """The signal as a user calls it."""
        return "Ctrl-C" if self.caught == signal.SIGINT else "SIGTERM"

    def error(self, when: str, hint: str) -> PetoolError:
        """What ends a run that was stopped `when`; exits as shells report it: 130 after Ctrl-C, 143 after SIGTERM."""
        return PetoolError(f"stopped by {self.name} {when}", hint, 128 + (self.caught or signal.SIGINT))

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """The graceful part. Raises KeyboardInterrupt for an earlier signal: a library may have swallowed its own."""
        if self.caught:
            raise KeyboardInterrupt
        self.graceful = True
        try:
            yield
        finally:
            self.graceful = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Catch both signals until the block ends; outside a graceful part they raise KeyboardInterrupt. After the first
    one the system's own handling is back, so that a second one ends the process whatever it does. Does nothing in a
    thread, where Python takes no signals."""
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        stop.caught = signal.Signals(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not stop.graceful:
            raise KeyboardInterrupt
        if is_first():
            say_at_once(f"{stop.name}: finishing this step, then saving; once more leaves at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What trains: the machine's arithmetic, and the processes of one run, one for each GPU, as torchrun starts them. The
first makes the run directory, reads the data first, writes and reports; the others follow it. After Ctrl-C or SIGTERM
all finish their step and save; a second one ends a process at once."""

import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from petool_lite.console import say_at_once
from petool_lite.errors import PetoolError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.10, and before


@cache
def arithmetic() -> Any:
    """What this machine multiplies in: bfloat16 on a GPU and on processors with instructions for it, else float32.
    Without them a product in bfloat16 takes four times as long as one in float32, or more, and says no more."""
    import torch

    here = torch.cuda.is_available() or any(v for name, v in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.bfloat16 if here else torch.float32


def arithmetic_name() -> str:
    """`arithmetic` as records write it."""
    return str(arithmetic()).removeprefix("torch.")


def grow_in_place() -> None:
    """Let torch's memory on a GPU grow where it lies, unless the user's environment says otherwise: in blocks of fixed
    sizes torch held 11 GiB for a run that used 6.3. Drivers of WSL and of some ARM boards cannot do it."""
    here = platform.uname()
    plain = here.system == "Linux" and here.machine == "x86_64" and "microsoft" not in here.release.lower()
    if plain and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> bool:
    """Whether the model itself is parted among the processes, as `accelerate launch --use_fsdp` has it."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def is_first() -> bool:
    """Whether this process writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes for the time of the block. They leave together: one that left while the first still
    saved would end by its threads, and torchrun would then end the first one too."""
    if count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))  # they wait while the first evaluates
    try:
        yield
        torch.distributed.barrier()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def first_then_others(make: Callable[[], Any]) -> Any:
    """Call `make` in the first process, then in the others, which find on the disk what the first left there."""
    if count() == 1:
        return make()
    from accelerate import PartialState

    with PartialState().main_process_first():
        return make()


def together(items: list[Any]) -> list[Any]:
    """The items of all processes; all of them have to ask at the same place."""
    if count() == 1:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process."""
    return together([value])[0]


def agreed(flag: bool) -> bool:
    """Whether any process of the run says so."""
    return any(together([flag]))


class Stop:
    """Which signal asked to stop, if any; `graceful` is set while a training loop looks at it after every step."""

    caught: signal.Signals | None = None
    name = "Ctrl-C"  # as a user calls it
    graceful = False

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
    """Catch both signals until the block ends; outside a graceful part they raise KeyboardInterrupt. The system's own
    handling of a second one ends the process. Does nothing in a thread, where Python takes no signals."""
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        stop.caught, stop.name = signal.Signals(number), "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
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

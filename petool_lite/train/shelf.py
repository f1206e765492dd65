"""What layers keep for their backward pass, in the machine's memory and not the GPU's, copied while the GPU works.

Copies run on a stream of their own, but all memory of the GPU is taken and given back on the stream that computes. So
its allocator sees the order of one stream: it gives memory out again at once, and holds one pool and not two.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

_A_PIECE = 8  # tensors of the first one's size in a piece of pinned memory, at least
# In bytes of the pass's first tensor, the hidden states: what may lie on the device besides what is computed with.
_LEAVING = 4  # waiting to be copied to the machine's memory
AHEAD = 2  # fetched from there before it is asked for


@dataclass(frozen=True)
class _Place:
    """Where an item lies: its bytes in the machine's memory, and what they are."""

    bytes: Any
    shape: Any
    kind: Any

    @property
    def size(self) -> int:
        return int(self.shape.numel() * self.kind.itemsize)


class Shelf:
    """A stack: what was put last is taken first, and what comes next is fetched ahead."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pieces: list[Any] = []
        self._piece = self._used = 0  # the piece being filled, and its bytes in use
        self._places: list[_Place] = []
        self._leaving: deque[tuple[Any, Any]] = deque()  # tensors, and events: the copy is made
        self._ahead: dict[int, tuple[Any, Any]] = {}

    @property
    def held(self) -> int:
        """Bytes that wait to be taken, since the last `clear`."""
        return sum(place.size for place in self._places)

    @property
    def reserved(self) -> int:
        """Bytes of the machine's memory that were taken for that, pinned where there is a GPU."""
        return sum(len(piece) for piece in self._pieces)

    def clear(self) -> None:
        """Forget what was put: a new forward pass begins. The memory is used again."""
        import torch

        if self._leaving or self._ahead:  # a pass that was not finished: its copies may be on their way
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._piece = self._used = 0
        self._places.clear()
        self._leaving.clear()
        self._ahead.clear()

    def put(self, item: Any) -> int:
        """Copy a tensor to the machine's memory; its place, for `take`. Where the bus is slower than the device, that
        waits until all but the last tensors are copied: it costs time, and not the device's memory."""
        import torch

        place = _Place(self._room(item.numel() * item.element_size()), item.shape, item.dtype)
        self._places.append(place)
        if self.stream is None:
            self._view(place).copy_(item)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self._view(place).copy_(item, non_blocking=True)
                self._leaving.append((item, self.stream.record_event()))
            self._let_go(_LEAVING * self._places[0].size)
        return len(self._places) - 1

    def take(self, number: int) -> Any:
        """The tensor of a place, on the device; the places before it are fetched meanwhile."""
        import torch

        if self.stream is None:
            return self._view(self._places[number]).clone()
        self._let_go(0)
        if number not in self._ahead:
            self._fetch(number)
        item, done = self._ahead.pop(number)
        torch.cuda.current_stream(self.device).wait_event(done)
        earlier = number - 1
        ahead = sum(self._places[place].size for place in self._ahead)
        while earlier >= 0 and ahead < AHEAD * self._places[0].size:
            if earlier not in self._ahead:
                self._fetch(earlier)
                ahead += self._places[earlier].size
            earlier -= 1
        return item

    def _let_go(self, allowed: int) -> None:
        """Forget the tensors that leave, first come first, until `allowed` bytes are left. What the device computes
        from here on waits for their copies, so their memory may be given out again."""
        import torch

        left = sum(item.nbytes for item, _ in self._leaving)
        while left > allowed:
            item, copied = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(copied)
            left -= item.nbytes

    def _fetch(self, number: int) -> None:
        import torch

        place = self._places[number]
        item = torch.empty(place.shape, dtype=place.kind, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # what used this memory before is done by then
        with torch.cuda.stream(self.stream):
            item.copy_(self._view(place), non_blocking=True)
            self._ahead[number] = item, self.stream.record_event()

    def _room(self, size: int) -> Any:
        """Bytes that nothing else of this pass uses, from the pieces there are or a new one."""
        import torch

        size = -(-size // 256) * 256
        while self._piece < len(self._pieces) and self._used + size > len(self._pieces[self._piece]):
            self._piece, self._used = self._piece + 1, 0
        if self._piece == len(self._pieces):
            self._pieces.append(torch.empty(piece_size(size), dtype=torch.uint8, pin_memory=self.stream is not None))
        found = self._pieces[self._piece][self._used : self._used + size]
        self._used += size
        return found

    @staticmethod
    def _view(place: _Place) -> Any:
        return place.bytes[: place.size].view(place.kind).view(place.shape)


def piece_size(size: int) -> int:
    """Bytes of a piece of pinned memory whose first tensor has `size`; torch rounds up to a power of two anyway."""
    return 1 << (_A_PIECE * size - 1).bit_length()


@contextmanager
def pinning(count: int, size: int) -> Iterator[None]:
    """Pin `count` pieces of `size` bytes while the block runs, for a shelf that comes later: 27 GiB take 16 seconds.

    torch keeps what is given back to it. Where memory is short, the shelf will find out.
    """
    if not count:
        yield
        return
    import torch

    ended = threading.Event()
    device = torch.cuda.current_device()

    def pin() -> None:
        torch.cuda.set_device(device)
        held: list[Any] = []
        with suppress(RuntimeError):
            while len(held) < count and not ended.is_set():
                held.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))

    thread = threading.Thread(target=pin, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        raise
    finally:
        thread.join()

"""What layers keep for their backward pass, in the machine's memory and not the GPU's, copied while the GPU works."""

from dataclasses import dataclass
from typing import Any

_A_PIECE = 8  # tensors of the first one's size in a piece of pinned memory, at least
_WAITING = 4  # tensors that may wait on the device for being copied, or were taken and may be in use


@dataclass(frozen=True)
class _Place:
    """Where an item lies: its bytes in the machine's memory, and what they are."""

    bytes: Any
    shape: Any
    kind: Any


class Shelf:
    """A stack: what was put last is taken first, and what comes next is fetched ahead."""

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pieces: list[Any] = []
        self._piece = self._used = 0  # the piece being filled, and its bytes in use
        self._places: list[_Place] = []
        self._copied: list[Any] = []  # events: the copy of each place is made
        self._taken: list[Any] = []  # events: what was to be computed before each taking is done
        self._ahead: dict[int, tuple[Any, Any]] = {}

    @property
    def held(self) -> int:
        """Bytes that wait to be taken, since the last `clear`."""
        return sum(place.shape.numel() * place.kind.itemsize for place in self._places)

    @property
    def reserved(self) -> int:
        """Bytes of the machine's memory that were taken for that, pinned where there is a GPU."""
        return sum(len(piece) for piece in self._pieces)

    def clear(self) -> None:
        """Forget what was put: a new forward pass begins. The memory is used again."""
        self._piece = self._used = 0
        self._places.clear()
        self._copied.clear()
        self._taken.clear()
        self._ahead.clear()

    def put(self, item: Any) -> int:
        """Copy a tensor to the machine's memory; its place, for `take`. Returns when all but the last tensors are
        copied: a slow bus costs time, and not the device's memory."""
        import torch

        place = _Place(self._room(item.numel() * item.element_size()), item.shape, item.dtype)
        self._places.append(place)
        if self.stream is None:
            self._view(place).copy_(item)
        else:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self._view(place).copy_(item, non_blocking=True)
                self._copied.append(self.stream.record_event())
            item.record_stream(self.stream)
            _keep_up(self._copied)
        return len(self._places) - 1

    def take(self, number: int) -> Any:
        """The tensor of a place, on the device; the two places before it are fetched meanwhile."""
        import torch

        if self.stream is None:
            return self._view(self._places[number]).clone()
        self._fetch(number)
        item, done = self._ahead.pop(number)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        item.record_stream(current)
        self._taken.append(current.record_event())
        _keep_up(self._taken)
        for earlier in (number - 1, number - 2):
            if earlier >= 0:
                self._fetch(earlier)
        return item

    def _fetch(self, number: int) -> None:
        import torch

        if number in self._ahead:
            return
        place = self._places[number]
        with torch.cuda.stream(self.stream):
            item = torch.empty(place.shape, dtype=place.kind, device=self.device)
            item.copy_(self._view(place), non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        self._ahead[number] = (item, done)

    def _room(self, size: int) -> Any:
        """Bytes that nothing else of this pass uses, from the pieces there are or a new one."""
        import torch

        size = -(-size // 256) * 256
        while self._piece < len(self._pieces) and self._used + size > len(self._pieces[self._piece]):
            self._piece, self._used = self._piece + 1, 0
        if self._piece == len(self._pieces):
            # torch rounds a pinned allocation up to a power of two
            whole = 1 << (_A_PIECE * size - 1).bit_length()
            self._pieces.append(torch.empty(whole, dtype=torch.uint8, pin_memory=self.stream is not None))
        found = self._pieces[self._piece][self._used : self._used + size]
        self._used += size
        return found

    @staticmethod
    def _view(place: _Place) -> Any:
        count = place.shape.numel() * place.kind.itemsize
        return place.bytes[:count].view(place.kind).view(place.shape)


def _keep_up(events: list[Any]) -> None:
    """Wait for the device where the host is too far ahead: a freed tensor's memory is given out again only when the
    device is past what used it, so a host that runs ahead would take ever more."""
    if len(events) > _WAITING:
        events[-1 - _WAITING].synchronize()

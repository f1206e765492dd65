"""The shelf's copies beside the computation: right in whatever order two streams of a GPU may come to run.

No GPU is needed: a device stands in whose streams only note what they are told. Its memory is given out again when the
host lets go of a tensor, as torch's allocator does on one stream. Afterwards all is done in an order that the notes
allow, the most unfavourable ones among them, and what was taken is compared with what was put.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petool_lite.train.shelf import Shelf, pinning


@dataclass
class Work:
    """Something that a stream is told to do, once others are done."""

    do: Callable[[], object]
    after: list["Work"]
    stream: "Stream"
    done: bool = False


@dataclass(eq=False)
class Stream:
    """Notes its work in order."""

    device: "Device"
    last: list[Work] = field(default_factory=list)

    def add(self, do: Callable[[], object]) -> None:
        work = Work(do, self.last, self)
        self.last = [work]
        self.device.noted.append(work)

    def record_event(self) -> list[Work]:
        return self.last

    def wait_event(self, event: list[Work]) -> None:
        self.last = self.last + event if self.device.waits else self.last

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.last)


class Device:
    """Two streams, and memory that is given out again at once."""

    type = "cuda"

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits
        self.noted: list[Work] = []
        self.main = self.current = Stream(self)
        self.free: dict[int, list[Any]] = {}
        self.taken = 0  # bytes that were ever asked of the system

    def empty(self, *shape: int) -> "Tensor":
        size = torch.Size(shape).numel()
        left = self.free.setdefault(size, [])
        if not left:
            self.taken += 4 * size
            left.append(torch.full((size,), -1.0))
        return Tensor(self, left.pop(), torch.Size(shape))

    def run(self, rank: Callable[[Work], Any]) -> None:
        """Do what was noted; of what may be done, the work of the lowest rank."""
        waiting = list(self.noted)
        while waiting:
            ready = [work for work in waiting if all(other.done for other in work.after)]
            work = min(ready, key=rank)
            work.do()
            work.done = True
            waiting.remove(work)


class Tensor:
    """A tensor on the device, which gives its memory back when nobody holds it."""

    dtype = torch.float32

    def __init__(self, device: Device, memory: Any, shape: Any) -> None:
        self.device, self.memory, self.shape = device, memory, shape

    def __del__(self) -> None:
        self.device.free[len(self.memory)].append(self.memory)

    @property
    def nbytes(self) -> int:
        return 4 * len(self.memory)

    def numel(self) -> int:
        return len(self.memory)

    def element_size(self) -> int:
        return 4

    def fill(self, value: float) -> None:
        memory = self.memory
        self.device.current.add(lambda: memory.fill_(value))

    def copy_(self, source: Any, non_blocking: bool) -> None:
        memory = self.memory
        self.device.current.add(lambda: memory.copy_(source.flatten()))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any, options: Any) -> None:
        """A tensor of the machine copies one of the device."""
        assert function is torch.Tensor.copy_
        target, source = given
        memory = source.memory
        source.device.current.add(lambda: target.copy_(memory.view(target.shape)))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], Shelf]:
    """A shelf of a device that stands in."""

    def make(device: Device) -> Shelf:
        plain = torch.empty

        def empty(*shape: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Any:
            return device.empty(*shape[0]) if isinstance(device, Device) else plain(*shape, **options)

        @contextmanager
        def stream(other: Stream) -> Iterator[None]:
            device.current = other
            yield
            device.current = device.main

        made = {"Stream": Stream, "current_stream": lambda _: device.current, "stream": stream}
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(**made))
        monkeypatch.setattr(torch, "empty", empty)
        return Shelf(device)

    return make


def passes(device: Device, shelf: Shelf, unfinished: bool = False) -> list[tuple[float, float]]:
    """Two passes of ten blocks, forward and backward, with memory that comes and goes between; after all is done, what
    was put in each place beside what was found there. `unfinished`: the first one stops in its backward pass."""
    pairs: list[tuple[float, float]] = []

    def found(number: float, item: Tensor) -> None:
        memory = item.memory
        device.main.add(lambda: pairs.extend((number, float(value)) for value in memory.unique()))

    def busy() -> None:
        for width in (6, 10, 2):  # the same sizes, so the memory of what was let go
            device.empty(5, width).fill(-2.0)

    for start in (100, 200):
        shelf.clear()
        places = []
        for block in range(10):
            for part, width in enumerate((6, 2, 10, 2, 6)):
                item = device.empty(5, width)
                item.fill(start + 5 * block + part)
                places.append(shelf.put(item))
                del item
            busy()
        for place in reversed(places[25:] if unfinished and start == 100 else places):
            found(start + place, shelf.take(place))
            busy()
    return pairs


def drawn(seed: int) -> Callable[[Device], Callable[[Work], Any]]:
    """Any order."""
    rng = Random(seed)
    return lambda _: lambda _: rng.random()


ORDERS: dict[str, Callable[[Device], Callable[[Work], Any]]] = {
    "computation first": lambda device: lambda work: work.stream is not device.main,
    "copies first": lambda device: lambda work: work.stream is device.main,
    **{f"draw {seed}": drawn(seed) for seed in range(5)},
}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_taken_is_what_was_put_in_whatever_order_the_streams_run(stand_in, order, unfinished) -> None:
    device = Device()
    pairs = passes(device, stand_in(device), unfinished)
    assert not pairs, "nothing is done before it is asked for"
    device.run(ORDERS[order](device))
    assert len(pairs) == (75 if unfinished else 100)
    assert all(wanted == got for wanted, got in pairs)


@pytest.mark.parametrize("order", ["computation first", "copies first"])
def test_without_waiting_for_each_other_they_would_be_wrong(stand_in, order) -> None:
    """The stand-in sees what it is there for."""
    device = Device(waits=False)
    pairs = passes(device, stand_in(device))
    device.run(ORDERS[order](device))
    assert any(wanted != got for wanted, got in pairs)


def test_little_lies_on_the_device_at_once(stand_in) -> None:
    device = Device()
    passes(device, stand_in(device))
    hidden = 4 * 5 * 6
    everything = 10 * 4 * 5 * (6 + 2 + 10 + 2 + 6)
    assert device.taken < 12 * hidden < everything / 3


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is pinned, up to four pieces; then the machine has no more."""
    sizes: list[int] = []

    def empty(size: int, dtype: Any, pin_memory: bool) -> None:
        assert pin_memory
        if len(sizes) == 4:
            raise RuntimeError("no more")
        sizes.append(size)

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_device=lambda: 0, set_device=lambda _: None))
    monkeypatch.setattr(torch, "empty", empty)
    return sizes


@pytest.mark.parametrize("count", [0, 3, 4, 9])
def test_memory_is_pinned_meanwhile_as_far_as_there_is_any(pinned, count) -> None:
    with pinning(count, 1024):
        pass
    assert pinned == [1024] * min(count, 4)


def test_pinning_ends_with_what_it_was_for(pinned, monkeypatch) -> None:
    begun, fails = Event(), Event()
    piece = torch.empty

    def slowly(size: int, dtype: Any, pin_memory: bool) -> None:
        piece(size, dtype, pin_memory)
        begun.set()
        fails.wait(10)

    def load() -> None:
        begun.wait(10)
        Timer(0.2, fails.set).start()  # once the failure is known
        raise ValueError("the base does not load")

    monkeypatch.setattr(torch, "empty", slowly)
    with pytest.raises(ValueError, match="does not load"), pinning(4, 1024):
        load()
    assert pinned == [1024]

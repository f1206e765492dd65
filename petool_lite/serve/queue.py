"""The way of a request to the engine: it waits for a slot, runs, and ends early when its client leaves."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from petool_lite.inference.call import Request
from petool_lite.inference.worker import Engine, Event, failed
from petool_lite.serve.requests import Refusal

_STOP_S = 30  # seconds in which an engine hears that its request is not wanted; beside nine busy threads it took 6


class Turns:
    """Slots, and who gets the next one: a user of whom less runs, then one who was served longer ago, then who came
    first. So a user with many requests keeps no other one waiting; requests without a user are one user's."""

    def __init__(self, slots: int) -> None:
        self._slots, self._running = slots, Counter[str | None]()
        self._waiting: dict[asyncio.Future[None], tuple[str | None, int]] = {}  # user and number of each request
        self._served: dict[str | None, int] = {}  # of those who run or wait: which request of all was their last
        self._numbers = itertools.count(1)

    async def take(self, user: str | None) -> None:
        """Wait for a slot; cancelled, the place in the queue is given up."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = user, next(self._numbers)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if self._waiting.pop(turn, None) is None:
                self.give_back(user)
            raise

    def give_back(self, user: str | None) -> None:
        """The slot is free again."""
        self._running[user] -= 1
        self._next()

    def _next(self) -> None:
        def rank(turn: asyncio.Future[None]) -> tuple[int, int, int]:
            user, number = self._waiting[turn]
            return self._running[user], self._served.get(user, 0), number

        while self._running.total() < self._slots and (wanted := [one for one in self._waiting if not one.cancelled()]):
            turn = min(wanted, key=rank)
            user, _ = self._waiting.pop(turn)
            self._running[user] += 1
            self._served[user] = next(self._numbers)
            turn.set_result(None)
        self._running = +self._running
        present = {*self._running, *(user for user, _ in self._waiting.values())}
        self._served = {user: number for user, number in self._served.items() if user in present}


class RequestQueue:
    """Takes requests to the engine, and turns those away that find the queue full."""

    def __init__(self, settings: Any) -> None:
        """`settings` are ServeSettings."""
        self.settings = settings
        self.engine = Engine(settings.model, settings.n_ctx, settings.slots)
        self._turns, self._numbers = Turns(settings.slots), itertools.count()
        self._sender = ThreadPoolExecutor(1, "sender")  # what blocks, in its order: starting the engine, writing to it
        self.present = 0  # requests that run or wait

    async def events(self, request: Request, left: Callable[[], Awaitable[None]]) -> AsyncIterator[Event]:
        """Events of one request, the last one not a "delta"; `left` returns when its client has gone, which ends it.
        Events are kept for a client that reads slowly. Raises Refusal where the queue is full."""
        if self.present >= self.settings.queue + self.settings.slots:
            raise Refusal(429, "the queue is full; try again later", kind="rate_limit_error")
        self.present += 1
        found = asyncio.Queue[Event | None]()
        served = asyncio.create_task(self._served(request, found))
        watcher = asyncio.ensure_future(left())
        watcher.add_done_callback(lambda _: served.cancel())
        try:
            while event := await found.get():
                yield event
        finally:
            watcher.cancel()  # and with it what still runs

    async def _served(self, request: Request, found: asyncio.Queue[Event | None]) -> None:
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.take(request.user)
            try:
                await self._run(request, deadline, found)
            finally:
                self._turns.give_back(request.user)
        except TimeoutError:
            found.put_nowait(failed("timeout", "the request waited longer than the server allows"))
        finally:
            self.present -= 1
            found.put_nowait(None)

    async def _run(self, request: Request, deadline: float, found: asyncio.Queue[Event | None]) -> None:
        """Have the engine answer. Cancelled or late, wait until it has heard so; one that does not is replaced. Whose
        time is over is told at once."""
        loop, number, over, late = asyncio.get_running_loop(), next(self._numbers), asyncio.Event(), False

        def take(event: Event) -> None:
            if not late:
                found.put_nowait(event)
            if event[0] != "delta":
                over.set()

        def hand_on(event: Event) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(take, event)

        async def give_up() -> None:
            await asyncio.wait([sent])
            try:
                async with asyncio.timeout(_STOP_S):
                    await loop.run_in_executor(self._sender, self.engine.cancel, number)
                    await over.wait()
            except TimeoutError:
                self.engine.kill()
                await over.wait()

        sent = loop.run_in_executor(self._sender, self.engine.send, number, request, hand_on)
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(sent)
                await over.wait()
        except (TimeoutError, asyncio.CancelledError) as why:
            if late := isinstance(why, TimeoutError) and not over.is_set():
                for event in (failed("timeout", "the request took longer than the server allows"), None):
                    found.put_nowait(event)
            ending = asyncio.ensure_future(give_up())
            while not ending.done():
                with suppress(asyncio.CancelledError):  # a client may leave after its time, too
                    await asyncio.wait([ending])

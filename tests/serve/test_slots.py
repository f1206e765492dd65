"""Many at once: slots of one context answer as one alone would, in turn, and those who leave cost nobody anything."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from support_gguf import write_gguf
from support_serve import ASK, SLOW, TOOLS, Server

from petool_lite import ToolCaller
from petool_lite.data.files import load_dataset
from petool_lite.inference.call import CallOptions, Request
from petool_lite.inference.parse import CallFailure
from petool_lite.serve.queue import RequestQueue, Turns

ENTRIES = load_dataset("demo:test:12").entries


def together(work: Callable[[int], Any], count: int) -> list[Any]:
    """What `work` returns for each number, all at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_replies_are_those_of_one_alone(tmp_path) -> None:
    """With a Llama in float32, where rounding moves no choice: products of few rows round otherwise than of many."""
    exact = write_gguf(tmp_path / "exact.gguf", llama__context_length=4096)
    chosen = CallOptions(choice="required", reply_tokens=24)

    def answers(caller: ToolCaller, numbers: range) -> list[Any]:
        found = []
        for number in numbers:
            try:
                found.append(caller.call_entry(ENTRIES[number], f"user{number % 3}", chosen).answer)
            except CallFailure as failure:  # this model writes on and on: then what it wrote is compared
                found.append(failure.reply)
        return found

    with ToolCaller(exact, 2048) as caller:
        alone = answers(caller, range(12))
    with ToolCaller(exact, 2048) as caller:
        slots = caller.slots(4)
        mine = together(lambda slot: answers(slots[slot], range(slot, 12, 4)), 4)
    assert [mine[number % 4][number // 4] for number in range(12)] == alone
    assert len(set(map(str, alone))) > 6


def test_who_was_served_least_goes_next() -> None:
    async def served(*users: str | None) -> list[str | None]:
        turns, order = Turns(2), list[str | None]()

        async def one(user: str | None) -> None:
            await turns.take(user)
            order.append(user)
            await asyncio.sleep(0)
            turns.give_back(user)

        tasks = [asyncio.create_task(one(user)) for user in users]
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(served("ann", "ann", "ann", "ann", "bob", None, "ann"))
    assert order == ["ann", "ann", "bob", None, "ann", "ann", "ann"]


def test_a_slot_is_free_when_the_engine_has_heard_also_of_a_client_that_leaves_after_its_time() -> None:
    async def scene() -> None:
        settings = SimpleNamespace(model=Path(), n_ctx=0, slots=1, queue=1, timeout_s=0.15)
        queue, leaving, asked = RequestQueue(settings), asyncio.Event(), list[Callable[..., object]]()
        nobody, told = Request({}, CallOptions()), list[tuple[str, str]]()
        # an engine that hears nothing; `asked` are those who wait for its events
        queue.engine = SimpleNamespace(send=lambda _, request, take: asked.append(take), cancel=lambda number: None)

        async def ask(leaves: asyncio.Event) -> None:
            told.extend([(kind, facts.get("kind", "")) async for kind, facts in queue.events(nobody, leaves.wait)])

        first = asyncio.create_task(ask(leaving))
        await asyncio.sleep(0.2)  # its time is over
        assert (told, first.done()) == ([("failed", "timeout")], True), "told before the engine has heard"
        leaving.set()
        second = asyncio.create_task(ask(asyncio.Event()))
        await asyncio.sleep(0.05)
        assert (len(asked), queue.present) == (1, 2)
        asked[0](("failed", {"kind": "cancelled", "message": ""}))
        await asyncio.sleep(0.05)
        assert (len(asked), queue.present) == (2, 1)
        asked[1](("done", {}))
        await asyncio.gather(first, second)
        assert (queue.present, told[1:]) == (0, [("done", "")])

    asyncio.run(scene())


def test_50_clients_get_an_answer_or_429_and_those_who_leave_cost_nobody_anything() -> None:
    body = {"messages": ASK, "tools": TOOLS, "max_tokens": 32, "tool_choice": "required"}
    statuses, names, patience = Counter[int](), Counter[str](), time.monotonic() + 400

    def client(number: int) -> None:
        if number % 5 == 0:  # leaves amid the reply, or before anything came back, while it is read or waits
            seconds, url = (100, number / 30 + 0.05)[number % 10 == 0], f"{server.url}/chat/completions"
            with suppress(httpx.TimeoutException), httpx.stream("POST", url, json=SLOW, timeout=seconds) as answer:
                assert answer.status_code == 429 or next(answer.iter_raw())
            return
        while time.monotonic() < patience:
            status, answer = server.post(body | {"user": f"user{number % 3}", "store": False})
            statuses[status] += 1
            if status == 200:
                names[answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"]] += 1
                return
            time.sleep(0.5)

    with Server("--slots", 4, "--queue", 6) as server:
        pid, alone = server.engine(), server.post(body)[1]
        together(client, 50)
        assert set(statuses) <= {200, 429}
        one = alone["choices"][0]["message"]["tool_calls"][0]["function"]["name"]
        assert (statuses[200], names) == (40, {one: 40})
        server.has(0, 10)  # nothing is left of those who went
        assert server.engine() == pid, "nobody's leaving ended the engine"

"""The one renderer: entry -> chat messages -> token ids and where the answer starts, for training, scoring and calls.
The answer's ids follow the prompt's, so the loss mask is a position, never a search for marker text."""

import contextlib
import gc
import hashlib
import json
import os
import re
import signal
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from petool_lite.data.entries import Answer, Call, Entry, bearing, properties
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.data.petoolbench import prompt_of, published_call
from petool_lite.errors import PetoolError, in_words
from petool_lite.places import default_threads

# Llama-3.x templates print today's date unless told otherwise; a fixed one keeps prompts the same every day.
_DATE = "26 Jul 2024"
OVERLENGTH = ("trim-history", "drop", "error")
STYLES = ("published", "petool")
# Counts up when a style's ids change (a golden test tells): a model knows only the layout that it was trained on.
LAYOUTS = {"published": 1, "petool": 1}
CALL_START, CALL_END = "<tool_call>\n", "\n</tool_call>"  # around a call, as Hermes writes it
_PETOOL = Path(__file__).with_name("petool.jinja")
_BOUNDARY = "{#- petool-lite: the base's own template #}"
# What a template without a role for the system gets: its message goes before the user's.
_FOLD = (
    "{%- if messages|length > 1 and messages[0].role == 'system' -%}{%- set messages = [{'role': 'user', 'content': "
    "messages[0].content ~ '\\n\\n' ~ messages[1].content}] + messages[2:] -%}{%- endif -%}"
)
_LONGEST = 400  # characters of a description in petool.jinja
_BATCH = 32  # rows tokenized together, and rendered by one process before it looks whether to stop
_CONTROL = re.compile(r"<\|[^|<>\s]{1,64}\|>")  # how chat models write their control tokens


@dataclass(frozen=True)
class Chat:
    """How one model talks: its tokenizer (no special token is added, those in the text are read), template and end."""

    encode_batch: Callable[[list[str]], list[list[int]]]
    template: str
    bos_token: str
    eos_token: str
    eos_id: int
    decode: Callable[[list[int]], str] | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    def follow(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that go on behind others: without the space that SentencePiece puts before a text."""
        first = self.encode("\n")
        if len(first) < 2:
            return self.encode_batch(texts)
        return [ids[len(first) :] for ids in self.encode_batch([f"\n{text}" for text in texts])]

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template, as hex."""
        return hashlib.sha256(self.template.encode()).hexdigest()


@dataclass(frozen=True)
class Example:
    """Token ids of one row: `ids[:answer_start]` is the prompt, the rest the answer with its end token. `earlier` has
    start and end of each answer in the prompt that is learned, too; `rejected` is the wrong answer of a pair."""

    entry_id: str
    ids: list[int]
    answer_start: int
    history_dropped: int
    rejected: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """How many of the ids are learned."""
        return len(self.ids) - self.answer_start + sum(self.earlier[1::2]) - sum(self.earlier[::2])


def chat_from_directory(directory: Path) -> Chat:
    """The Chat of a model directory in Hugging Face format; needs the `tokenizers` library only."""
    from petool_lite.families import chat_template, end_tokens, load_tokenizer, special_token

    tokenizer, template, bos = load_tokenizer(directory), chat_template(directory), special_token(directory, "bos")
    eos, eos_id = next(iter(end_tokens(directory, tokenizer).items()))

    def encode(texts: list[str]) -> list[list[int]]:
        return [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return Chat(encode, template, bos, eos, eos_id, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)))


def recorded_style(style: str | None, layout: object) -> str | None:
    """The prompt style that a model names, None for none. Models from before layouts were counted record none; only the
    published style is the same as then. Raises PetoolError for a style or layout that is not today's."""
    if not style or (style == "published" and layout is None) or str(LAYOUTS.get(style)) == str(layout):
        return style or None
    what = f"the model learned layout {layout or 'unknown'} of the {style} prompt, which this version does not write"
    made = "the version of petool-lite that made it" if style in LAYOUTS else "petool-lite 0.1, which made it"
    raise PetoolError(what, f"train it again, or run it with {made}")


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 95 % point and maximum of some lengths; zeros for none."""
    ordered = sorted(lengths) or [0]
    return {"median": ordered[len(ordered) // 2], "p95": ordered[int(len(ordered) * 0.95)], "max": ordered[-1]}


@dataclass(frozen=True)
class Layout:
    """What decides a prompt beside the entry: the prompt style, the room there is, and what gives way."""

    style: str
    max_tokens: int
    overlength: str = "trim-history"


@dataclass(frozen=True)
class Rendered:
    """A prompt's ids, the first `shared` of them the same for every query; `history_dropped` calls are left out."""

    ids: list[int]
    shared: int
    history_dropped: int = 0


@lru_cache(maxsize=8)
def petool_template(base: str) -> str:
    """The template of the petool style around a base's own; the same for its own result."""
    return _PETOOL.read_text(encoding="utf-8").rstrip("\n") + with_system(base.rpartition(_BOUNDARY)[2])


def exported_template(base: str, style: str) -> str:
    """The template for a GGUF file: it renders the style's prompts in any server, on any day."""
    dated = f"{{%- set date_string = '{_DATE}' %}}{base}" if "date_string" in base else base
    answering = "{%- set enable_thinking = false %}" if "enable_thinking" in base else ""
    return petool_template(answering + dated) if style == "petool" else with_system(answering + dated)


@lru_cache(maxsize=8)
def with_system(base: str) -> str:
    """A template that takes a system message: where `base` refuses it or leaves it out, it goes before the user's."""
    said = [{"role": "system", "content": "petool-system"}, {"role": "user", "content": "petool-user"}]
    for template in (base, _FOLD + base):
        with contextlib.suppress(PetoolError):
            if "petool-system" in _filled(template, said, None, "", ""):
                return template
    return base  # which works for nothing: whoever renders it is told


def cut_descriptions(entry: Entry) -> int:
    """How many descriptions of an entry's tools and parameters the petool prompt cuts, each marked with "..."."""
    inner = [item for tool in entry.tools for item in properties(tool).values() if isinstance(item, Mapping)]
    texts = [*(tool.description for tool in entry.tools), *(str(item.get("description") or "") for item in inner)]
    return sum(len(text.strip()) > _LONGEST for text in texts)


def answer_text(answer: Answer, style: str) -> str:
    """What the model is to write: a call in the style's form, or the text of an answer without one."""
    if not isinstance(answer, Call):
        return answer
    if style == "published":
        return json.dumps(published_call(answer), ensure_ascii=False)
    return f"{CALL_START}{answer.to_json()}{CALL_END}"


def render_messages(chat: Chat, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """The text up to where the answer starts, by the petool template where there are tools, else by the model's own."""
    template = petool_template(chat.template) if tools else with_system(chat.template)
    return _filled(template, messages, tools, chat.bos_token, chat.eos_token)


def _filled(template: str, messages: Sequence[Any], tools: Sequence[Any] | None, bos: str, eos: str) -> str:
    """The prompt that a template makes: always on the same day, and without a part for thoughts."""
    from petool_lite.prompt.template import render_template

    fixed = {"add_generation_prompt": True, "date_string": _DATE, "enable_thinking": False, "bos_token": bos}
    return render_template(template, lambda form: _DATE, messages=messages, tools=tools, eos_token=eos, **fixed)


def _inert(value: Any, chat: Chat) -> Any:
    """A JSON value for a template: control tokens that somebody wrote into it, which could end a message, are broken up
    by a word joiner (U+2060) behind the first character. Numbers get six decimals, as llama.cpp's templates do."""
    if isinstance(value, str):
        for token in {chat.bos_token, chat.eos_token, *_CONTROL.findall(value)} - {""}:
            value = value.replace(token, f"{token[0]}\u2060{token[1:]}")
        return value
    if isinstance(value, Mapping):
        return {_inert(key, chat): _inert(item, chat) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_inert(item, chat) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def entry_request(chat: Chat, entry: Entry, style: str) -> dict[str, Any]:
    """What a server is asked for an entry: its messages, and its tools in the petool style, all `_inert`."""
    if style == "petool":
        tools = [tool_json(tool) for tool in entry.tools]
        messages = [{key: turn[key] for key in turn if key != "weight"} for turn in entry_messages(entry)]
        return {"messages": _inert(messages, chat)} | ({"tools": _inert(tools, chat)} if tools else {})
    if entry.published is None:
        raise PetoolError(f"entry {entry.id} has no published prompt", "only PEToolBench's do: set data.style = petool")
    system = {"role": "system", "content": prompt_of(entry.published)}
    return {"messages": _inert([system, {"role": "user", "content": entry.query}], chat)}


def prompt_text(chat: Chat, entry: Entry, layout: Layout) -> str:
    """The rendered chat up to where the answer starts."""
    return render_messages(chat, **entry_request(chat, entry, layout.style))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def drop_order(entry: Entry, style: str) -> list[int]:
    """Indices of earlier calls in the order in which they may go: what no petool prompt shows, then the oldest."""
    shown = bearing(entry)
    return shown if style == "petool" else [*sorted(set(range(len(entry.history))) - set(shown)), *shown]


def without_history(entry: Entry, gone: Collection[int]) -> Entry:
    """The entry without the earlier calls at these indices."""
    stays = [index for index in range(len(entry.history)) if index not in gone]
    pieces = entry.published and replace(entry.published, history=tuple(entry.published.history[i] for i in stays))
    return replace(entry, history=tuple(entry.history[index] for index in stays), published=pieces)


_Fitted = tuple[str, list[int], Entry]  # a prompt, its ids, and the entry as it is shown


def _fit(chat: Chat, entry: Entry, layout: Layout, text: str, ids: list[int], reserve: int) -> _Fitted | None:
    """Apply the policy for long rows to a prompt's `ids`; see `prompt_ids`."""
    room = layout.max_tokens - reserve
    if len(ids) <= room:
        return text, ids, entry
    if layout.overlength == "drop":
        return None
    if layout.overlength == "error":
        what = f"entry {entry.id} has {len(ids) + reserve} tokens, more than {layout.max_tokens}"
        raise PetoolError(what, 'raise model.max_tokens, or set data.overlength = "trim-history"')
    order = drop_order(entry, layout.style)

    @cache
    def without(count: int) -> _Fitted:
        shorter = without_history(entry, order[:count])
        text = prompt_text(chat, shorter, layout)
        return text, chat.encode(text), shorter

    # the fewest earlier calls to drop so that the rest fits
    count = 1 + bisect_left(range(1, len(order) + 1), True, key=lambda count: len(without(count)[1]) <= room)
    return without(count) if count <= len(order) else None


def prompt_ids(chat: Chat, entry: Entry, layout: Layout, reserve: int = 0) -> Rendered | None:
    """An entry's prompt, with as little history left out as lets prompt + `reserve` fit; nothing else is cut. None if
    it is too long: under "drop" as it stands, under "trim-history" without history. "error" raises PetoolError."""
    text = prompt_text(chat, entry, layout)
    if not (fitted := _fit(chat, entry, layout, text, chat.encode(text), reserve)):
        return None
    text, ids, shown = fitted
    start = text.rfind(str(_inert(entry.query, chat))) if entry.query else -1
    shared = common_length(chat.encode(text[:start]), ids) if start > 0 else 0  # a token may span the query's start
    return Rendered(ids, shared, len(entry.history) - len(shown.history))


def examples(chat: Chat, entries: Sequence[Entry], layout: Layout, pairs: bool = False) -> Iterator[Example | None]:
    """Training rows of at most `layout.max_tokens` ids, in order; None for an entry that is too long. With `pairs` each
    has a `rejected` answer, too. Raises PetoolError for an entry without an answer."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    starts, work = range(0, len(entries), _BATCH), (entries, chat, layout, pairs)
    cores = min(len(starts) // 4, default_threads())
    if cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (row for start in starts for row in _rendered(start, *work))
        return
    # a compiled template cannot be sent, but forked, and the entries need not be
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _as_worker, work)
    ended = in_words("a process that renders rows was ended from outside", "free memory, try again", BrokenProcessPool)
    gc.freeze()  # a collector writes to all that it looks at: each process would copy every entry
    try:
        with ended:
            for rows in pool.map(_rendered, starts):
                yield from rows
    finally:
        gc.unfreeze()
        pool.shutdown(wait=False, cancel_futures=True)  # at once, also where nobody wants the rest


_work: Any = None  # of a process that renders: entries, chat, layout, pairs


def _as_worker(*work: Any) -> None:
    """One thread; Ctrl-C is for the process that started this one, which ends it."""
    global _work
    _work, os.environ["TOKENIZERS_PARALLELISM"] = work, "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _rendered(start: int, *work: Any) -> list[Example | None]:
    entries, chat, layout, pairs = work or _work
    batch = entries[start : start + _BATCH]
    rows = list[Example | None]()
    if lost := next((entry for entry in batch if entry.answer is None), None):
        raise PetoolError(f"entry {lost.id} has no answer to learn", "training needs the right calls")
    texts = [prompt_text(chat, entry, layout) for entry in batch]
    right = chat.follow([answer_text(entry.answer or "", layout.style) for entry in batch])
    rejected = [answer_text(entry.rejected or "", layout.style) for entry in batch]
    wrong = chat.follow(rejected) if pairs else [[]] * len(batch)
    for entry, text, ids, answer, other in zip(batch, texts, chat.encode_batch(texts), right, wrong, strict=True):
        if not (fitted := _fit(chat, entry, layout, text, ids, reserve=max(len(answer), len(other)) + 1)):
            rows.append(None)
            continue
        (text, kept, shown), earlier = fitted, list[int]()
        if layout.style == "petool" and not pairs and any(turn.get("weight") for turn in entry.turns):
            kept, earlier = _with_earlier(chat, shown, text, kept, room=layout.max_tokens - len(answer) - 1)
        dropped, worse = len(entry.history) - len(shown.history), (*other, chat.eos_id) if pairs else ()
        rows.append(Example(entry.id, [*kept, *answer, chat.eos_id], len(kept), dropped, worse, tuple(earlier)))
    return rows


def _with_earlier(chat: Chat, entry: Entry, text: str, ids: list[int], room: int) -> tuple[list[int], list[int]]:
    """A prompt's ids with the answers of earlier turns that are to be learned cut as new ones are, and start and end of
    each. Not learned are those that the model's template writes otherwise, and none if the cuts need more `room`."""
    query = str(_inert(entry.query, chat))
    at = text.rfind(query) if query else -1
    opening = text[at + len(query) :] if at > 0 else "\0"  # what stands between a request and its answer
    cuts: list[int] = []
    for turn in reversed(_inert(entry.turns, chat)):
        texts = [turn["content"]] if turn["content"] or turn["role"] != "assistant" else []
        for made in (made["function"] for made in turn.get("tool_calls") or ()):
            name = json.dumps(made["name"], ensure_ascii=False)
            texts.append(f'{CALL_START}{{"name": {name}, "arguments": {made["arguments"]}}}{CALL_END}')
        written = "\n".join(texts)  # as petool.jinja writes it
        at = text.rfind(written, 0, max(at, 0))
        end = at + len(written) + len(chat.eos_token)
        if at > 0 and turn.get("weight") and text[:at].endswith(opening) and text[:end].endswith(chat.eos_token):
            cuts = [at, end, *cuts]
    first, *rest = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = [chat.encode(first), *chat.follow(rest)]
    whole = [one for piece in pieces for one in piece]
    if len(whole) > room:
        return ids, []
    return whole, [sum(map(len, pieces[: number + 1])) for number in range(len(rest))]


def example(chat: Chat, entry: Entry, layout: Layout) -> Example | None:
    """The training row of one entry; see `examples`."""
    return next(examples(chat, [entry], layout))

"""The one renderer: entry -> chat messages -> token ids and where the answer starts.

Training, scoring and calling all take their ids from here. The answer's ids follow the prompt's ids, so
the loss mask is a position, never a search for marker text, and inference sees exactly what training saw.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.data.entries import Entry, Interaction, Prompt, provider
from petool_lite.errors import PetoolError
from petool_lite.prompt.compact import compact_prompt, related_history
from petool_lite.prompt.template import render_template

# Llama-3.x templates print today's date unless told otherwise; a fixed one keeps prompts the same every day.
_DATE = "26 Jul 2024"
OVERLENGTH = ("trim-history", "drop", "error")
STYLES = ("published", "compact")
# Counts up when a style's ids change (a golden test tells): a model knows only the layout that it was trained on.
LAYOUTS = {"published": 1, "compact": 4}
_BATCH = 128  # rows tokenized together
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

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template, as hex."""
        return hashlib.sha256(self.template.encode()).hexdigest()


@dataclass(frozen=True)
class Example:
    """Token ids of one row: `ids[:answer_start]` is the prompt, the rest the answer with its end token.

    `rejected`: in rows that were asked for as pairs, the ids of the wrong answer with its end token.
    """

    entry_id: str
    ids: list[int]
    answer_start: int
    history_dropped: int
    rejected: tuple[int, ...] = ()


def chat_from_directory(directory: Path) -> Chat:
    """The Chat of a model directory in Hugging Face format; needs the `tokenizers` library only."""
    from tokenizers import Tokenizer

    config = json.loads((directory / "tokenizer_config.json").read_text())
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise PetoolError(f"no chat template in {directory}", "petool-lite needs an instruct model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    eos = _token_text(config.get("eos_token"))
    eos_id = tokenizer.token_to_id(eos) if eos else None
    if eos is None or eos_id is None:
        raise PetoolError(f"no end token in {directory}/tokenizer_config.json", "eos_token must name a known token")
    return Chat(
        encode_batch=lambda texts: [
            found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ],
        template=template,
        bos_token=_token_text(config.get("bos_token")) or "",
        eos_token=eos,
        eos_id=eos_id,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
    )


def recorded_style(style: str | None, layout: object) -> str | None:
    """The prompt style that a model names, None for none, after checking that it learned today's layout of it.

    Models from before layouts were counted record none; only the published style is still the same as then. Raises
    PetoolError for another layout.
    """
    wanted = LAYOUTS.get(style or "")
    if wanted is None or str(layout) == str(wanted) or (layout is None and wanted == 1):
        return style
    raise PetoolError(
        f"the model learned layout {layout or 'unknown'} of the {style} prompt, this version writes layout {wanted}",
        "train it again, or run it with the version of petool-lite that made it",
    )


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 95 % point and maximum of some lengths; zeros for none."""
    ordered = sorted(lengths) or [0]
    return {"median": ordered[len(ordered) // 2], "p95": ordered[int(len(ordered) * 0.95)], "max": ordered[-1]}


def _inert(text: str, chat: Chat) -> str:
    """`text` with control tokens that somebody wrote into it broken up, so that they are read as text.

    A query or a tool's description could otherwise end its own message and begin another one. A word joiner (U+2060)
    behind the first character does it for every tokenizer; text without such tokens stays as it is.
    """
    for token in {chat.bos_token, chat.eos_token, *_CONTROL.findall(text)} - {""}:
        text = text.replace(token, f"{token[0]}\u2060{token[1:]}")
    return text


def render(chat: Chat, messages: Sequence[dict[str, str]]) -> str:
    """The text up to where the answer starts, by the model's own template; control tokens in messages become text."""
    return render_template(
        chat.template,
        lambda form: _DATE,
        messages=[{**message, "content": _inert(message["content"], chat)} for message in messages],
        bos_token=chat.bos_token,
        eos_token=chat.eos_token,
        add_generation_prompt=True,
        date_string=_DATE,
    )


@dataclass(frozen=True)
class Layout:
    """What decides a prompt's text beside the entry: the setting, the prompt style and the room there is."""

    setting: str
    style: str
    max_tokens: int
    overlength: str = "trim-history"


def _history(entry: Entry, layout: Layout) -> tuple[Interaction, ...]:
    """The interactions that the prompt style shows."""
    prompt = entry.prompt(layout.setting)
    return related_history(prompt) if layout.style == "compact" else prompt.history


def prompt_text(chat: Chat, entry: Entry, layout: Layout, kept: Sequence[Interaction] | None = None) -> str:
    """The rendered chat up to where the answer starts; `kept` replaces the history where some had to go."""
    prompt = entry.prompt(layout.setting)
    if layout.style == "compact":
        system = compact_prompt(prompt, layout.setting, kept)
    else:
        system = prompt.text if kept is None else prompt.with_history(kept).text
    return render(chat, [{"role": "system", "content": system}, {"role": "user", "content": entry.query}])


def _drop_order(prompt: Prompt, history: Sequence[Interaction]) -> list[Interaction]:
    """History in the order in which it may go: calls of providers that are no candidate first, the oldest first."""
    candidates = {provider(tool.name) for tool in prompt.tools}
    return sorted(history, key=lambda item: provider(item.call.tool_name) in candidates)


def _fit(chat: Chat, entry: Entry, layout: Layout, ids: list[int], reserve: int) -> tuple[list[int], int] | None:
    """Apply the policy for long rows to a prompt's `ids`; see `prompt_ids`."""
    room = layout.max_tokens - reserve
    if len(ids) <= room:
        return ids, 0
    if layout.overlength == "drop":
        return None
    if layout.overlength == "error":
        raise PetoolError(
            f"entry {entry.id} has {len(ids) + reserve} tokens, more than {layout.max_tokens}",
            'raise model.max_tokens, or set data.overlength = "trim-history"',
        )
    history = _history(entry, layout)
    order = _drop_order(entry.prompt(layout.setting), history)
    low, high, best = 1, len(order), None
    while low <= high:  # the fewest items to drop so that the rest fits
        count = (low + high) // 2
        gone = {id(item) for item in order[:count]}
        ids = chat.encode(prompt_text(chat, entry, layout, [item for item in history if id(item) not in gone]))
        if len(ids) <= room:
            best, high = (ids, count), count - 1
        else:
            low = count + 1
    return best


def prompt_ids(chat: Chat, entry: Entry, layout: Layout, reserve: int = 0) -> tuple[list[int], int] | None:
    """Ids of an entry's prompt, and how many history items were left out so that prompt + `reserve` fit.

    None means that the entry is too long: under "drop" as it stands, under "trim-history" even without any history,
    since tools, query and answer are never cut. Callers count and name such entries. "error" raises PetoolError.
    """
    return _fit(chat, entry, layout, chat.encode(prompt_text(chat, entry, layout)), reserve)


def examples(chat: Chat, entries: Sequence[Entry], layout: Layout, pairs: bool = False) -> Iterator[Example | None]:
    """Training rows of at most `layout.max_tokens` ids, in order; None for an entry that is too long.

    With `pairs` each entry needs a `rejected` answer, and the prompt fits with either answer. Tokenizes in batches,
    which uses every core. Raises PetoolError for an entry without a gold answer.
    """
    for start in range(0, len(entries), _BATCH):
        batch = entries[start : start + _BATCH]
        answers = []
        for entry in batch:
            if entry.gold is None:
                raise PetoolError(f"entry {entry.id} has no answer to learn", "training needs the right calls")
            answers.append(entry.gold.to_json())
        encoded = chat.encode_batch([prompt_text(chat, entry, layout) for entry in batch] + answers)
        wrong = chat.encode_batch([entry.rejected or "" for entry in batch]) if pairs else [[]] * len(batch)
        for entry, ids, answer, other in zip(batch, encoded, encoded[len(batch) :], wrong, strict=False):
            fitted = _fit(chat, entry, layout, ids, reserve=max(len(answer), len(other)) + 1)
            rejected = (*other, chat.eos_id) if pairs else ()
            row = fitted and [*fitted[0], *answer, chat.eos_id]
            yield Example(entry.id, row, len(fitted[0]), fitted[1], rejected) if fitted and row else None


def example(chat: Chat, entry: Entry, layout: Layout) -> Example | None:
    """The training row of one entry; see `examples`."""
    return next(examples(chat, [entry], layout))

"""The one renderer: entry -> chat messages -> token ids and where the answer starts.

Training, scoring and calling all take their ids from here. The answer's ids follow the prompt's ids, so
the loss mask is a position, never a search for marker text, and inference sees exactly what training saw.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.compact import compact_prompt, related_history
from petool_lite.data.entries import Entry, Interaction, Prompt, provider
from petool_lite.errors import PetoolError

# Llama-3.x templates print today's date unless told otherwise; a fixed one keeps prompts the same every day.
_DATE = "26 Jul 2024"
OVERLENGTH = ("trim-history", "drop", "error")
STYLES = ("published", "compact")


@dataclass(frozen=True)
class Chat:
    """How one model talks: its tokenizer (no special token is added, those in the text are read), template and end."""

    encode: Callable[[str], list[int]]
    template: str
    bos_token: str
    eos_token: str
    eos_id: int

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the chat template, as hex."""
        return hashlib.sha256(self.template.encode()).hexdigest()


@dataclass(frozen=True)
class Example:
    """Token ids of one row: `ids[:answer_start]` is the prompt, the rest the answer with its end token."""

    entry_id: str
    ids: tuple[int, ...]
    answer_start: int
    history_dropped: int


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
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        template=template,
        bos_token=_token_text(config.get("bos_token")) or "",
        eos_token=eos,
        eos_id=eos_id,
    )


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def render(chat: Chat, messages: Sequence[dict[str, str]]) -> str:
    """The text up to where the answer starts, by the model's own template in a sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise PetoolError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: _DATE)
    try:
        return environment.from_string(chat.template).render(
            messages=list(messages),
            bos_token=chat.bos_token,
            eos_token=chat.eos_token,
            add_generation_prompt=True,
            date_string=_DATE,
        )
    except TemplateError as error:
        raise PetoolError(f"the model's chat template does not work: {error}") from error


@dataclass(frozen=True)
class Layout:
    """What decides a prompt's text beside the entry: the setting, the prompt style and the room there is."""

    setting: str
    style: str
    max_tokens: int
    overlength: str = "trim-history"


def _system(prompt: Prompt, layout: Layout, kept: Sequence[Interaction]) -> str:
    if layout.style == "compact":
        return compact_prompt(prompt, layout.setting, kept)
    return prompt.text if len(kept) == len(prompt.history) else prompt.with_history(kept).text


def _drop_order(prompt: Prompt, history: Sequence[Interaction]) -> list[Interaction]:
    """History in the order in which it may go: calls of providers that are no candidate first, the oldest first."""
    candidates = {provider(tool.name) for tool in prompt.tools}
    return sorted(history, key=lambda item: provider(item.call.tool_name) in candidates)


def prompt_ids(chat: Chat, entry: Entry, layout: Layout, reserve: int = 0) -> tuple[list[int], int] | None:
    """Ids of an entry's prompt, and how many history items were left out so that prompt + `reserve` fit.

    None means that the entry is too long: under "drop" as it stands, under "trim-history" even without any history,
    since tools, query and answer are never cut. Callers count and name such entries. "error" raises PetoolError.
    """
    prompt = entry.prompt(layout.setting)
    history = related_history(prompt) if layout.style == "compact" else prompt.history

    def ids_with(kept: Sequence[Interaction]) -> list[int]:
        messages = [
            {"role": "system", "content": _system(prompt, layout, kept)},
            {"role": "user", "content": entry.query},
        ]
        return chat.encode(render(chat, messages))

    ids = ids_with(history)
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
    order = _drop_order(prompt, history)
    low, high, best = 1, len(order), None
    while low <= high:  # the fewest items to drop so that the rest fits
        count = (low + high) // 2
        gone = {id(item) for item in order[:count]}
        ids = ids_with([item for item in history if id(item) not in gone])
        if len(ids) <= room:
            best, high = (ids, count), count - 1
        else:
            low = count + 1
    return best


def example(chat: Chat, entry: Entry, layout: Layout) -> Example | None:
    """A training row of at most `layout.max_tokens` ids; None if it is too long. Needs a gold answer."""
    if entry.gold is None:
        raise PetoolError(f"entry {entry.id} has no answer to learn", "training needs api_call_ground_truth or output")
    answer = [*chat.encode(entry.gold.to_json()), chat.eos_id]
    fitted = prompt_ids(chat, entry, layout, reserve=len(answer))
    if fitted is None:
        return None
    ids, dropped = fitted
    return Example(entry.id, (*ids, *answer), len(ids), dropped)

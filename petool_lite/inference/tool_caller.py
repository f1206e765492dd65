"""From a user's words, tools and history to one typed call: what `call`, `serve` and the Python API share.

from petool_lite import ToolCaller

with ToolCaller("model.q4_k_m.gguf") as caller:
    reply = caller.call("Show past rates of EUR.", tools=tools, history=history, user="ann")
    print(reply.call.tool_name, reply.call.parameters)
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from petool_lite.data.entries import SETTINGS, Entry, ToolCall
from petool_lite.errors import USAGE, PetoolError
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.llama_open import Closing
from petool_lite.inference.parse import ENGINE, CallFailure, parse_call
from petool_lite.inference.request import choose_setting, ratings_of, request_entry
from petool_lite.inference.sequences import common_length
from petool_lite.inference.settings import EngineSettings, library_version, model_sha256, tuned_settings
from petool_lite.inference.states import StateKey, StateStore
from petool_lite.prompt.render import Layout, prompt_ids, prompt_text, recorded_style

DECODINGS = ("constrained", "free", "likelihood")
DEFAULT_CONTEXT = 8192  # tokens; a model made for less has less
REPLY_TOKENS = 512


@dataclass(frozen=True)
class Candidate:
    """An offered tool with its probability among the offered ones, and what the history says of its provider."""

    tool_name: str
    probability: float
    ratings: dict[str, Any]


@dataclass(frozen=True)
class CallReply:
    """One call with what it took. Times in seconds; `first_token_s` runs from the request to the first choice.

    `saved_bytes` were written to the user's memory; `warning` says why it could not be.
    """

    call: ToolCall
    reply: Reply
    first_token_s: float
    seconds: float
    history_dropped: int
    candidates: tuple[Candidate, ...] = ()
    saved_bytes: int = 0
    warning: str = ""

    @property
    def timings(self) -> dict[str, float]:
        """Tokens, seconds and rates, for people and programs."""
        reply = self.reply
        read = reply.prompt_tokens - reply.reused_tokens
        return {
            "prompt_tokens": reply.prompt_tokens,
            "reused_tokens": reply.reused_tokens,
            "reply_tokens": len(reply.ids),
            "forced_tokens": reply.forced_tokens,
            "first_token_s": round(self.first_token_s, 4),
            "prefill_s": round(reply.prefill_s, 4),
            "decode_s": round(reply.decode_s, 4),
            "seconds": round(self.seconds, 4),
            "prefill_tokens_per_s": round(read / reply.prefill_s, 1) if reply.prefill_s else 0.0,
            "decode_tokens_per_s": round(len(reply.ids) / reply.decode_s, 1) if reply.decode_s else 0.0,
        }


@dataclass(frozen=True)
class CallOptions:
    """How a call is made: `decoding` is one of DECODINGS; `setting` None is the model's own.

    `trim_history` lets old history go where the prompt exceeds the context, instead of refusing it. `only` names the
    one tool that may be called (all stay in the prompt). `watch` gets the reply's text as it grows.
    """

    decoding: str = "constrained"
    setting: str | None = None
    trim_history: bool = False
    explain: bool = False
    reply_tokens: int = REPLY_TOKENS
    only: str | None = None
    watch: Callable[[str], None] | None = None


@dataclass
class _Memory:
    """The open context's link to users' files; one user's prefix is in the engine's memory at a time."""

    store: StateStore
    key: StateKey | None = None
    saved: dict[str, list[int]] = field(default_factory=dict)


class ToolCaller(Closing):
    """A loaded model that answers with calls. Use as a context manager; not safe to share between threads."""

    def __init__(
        self,
        model: str | Path,
        n_ctx: int = 0,
        settings: EngineSettings | None = None,
        style: str | None = None,
        store: StateStore | None = None,
    ) -> None:
        """Load a GGUF file. `n_ctx` in tokens (0: 8,192 or the model's own), `settings` None: what tuning found here.

        `style` overrides the prompt style that the file names ("compact" where it names none). Raises PetoolError.
        """
        self.path = Path(model).expanduser()
        with LlamaModel(self.path, vocab_only=True) as head:
            limit = head.train_ctx or DEFAULT_CONTEXT
        self._model = LlamaModel(self.path, n_ctx or min(limit, DEFAULT_CONTEXT), settings or tuned_settings(self.path))
        self._chat = self._model.chat()
        self._constrainer = self._model.constrainer()
        metadata = self._model.metadata
        own = (metadata.get("petool_lite.prompt_style"), metadata.get("petool_lite.prompt_layout"))
        self.style = style or recorded_style(*own) or "compact"
        # None: the file does not say, or the model learned all settings; then a request's own history tells.
        self.trained_setting = trained if (trained := metadata.get("petool_lite.setting")) in SETTINGS else None
        self._memory = _Memory(store or StateStore())

    @property
    def n_ctx(self) -> int:
        """The context's size in tokens: prompt and reply together."""
        return self._model.n_ctx

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def call(
        self,
        query: str,
        tools: Sequence[Any],
        history: Sequence[Any] = (),
        user: str | None = None,
        options: CallOptions | None = None,
    ) -> CallReply:
        """The call for `query`; `tools` and `history` in the published JSON shapes.

        With `user` (any text), what was read for that user is kept on disk for the next time. Raises CallFailure for a
        reply that is no valid call or a failing engine, PetoolError for a request that cannot be served.
        """
        options = options or CallOptions()
        setting = choose_setting(history, options.setting, self.trained_setting)
        if self.style == "published":
            raise PetoolError(
                "this model was trained on the published prompt, whose wording comes with an entry",
                "give a whole entry (--request), or a model trained on the compact prompt",
            )
        return self.call_entry(request_entry(query, list(tools), list(history), setting), user, options)

    def call_entry(self, entry: Entry, user: str | None = None, options: CallOptions | None = None) -> CallReply:
        """Like `call`, for a whole published entry."""
        options = options or CallOptions()
        if options.decoding not in DECODINGS:
            raise PetoolError(f"unknown decoding: {options.decoding}", f"one of: {', '.join(DECODINGS)}", USAGE)
        started = time.perf_counter()
        setting = options.setting or self.trained_setting or next(iter(entry.prompts))
        setting = setting if setting in entry.prompts else next(iter(entry.prompts))
        ids, dropped, prefix = self._prompt(entry, setting, options)
        tools = [tool for tool in entry.prompt(setting).tools if options.only in (None, tool.name)]
        if not tools:
            raise PetoolError(f"the tool to call was not offered: {options.only}", "name one of the tools")
        constraint = None if options.decoding == "free" else self._constrainer.start(tools)
        if user is not None:
            self._recall(user, ids)
        held = common_length(self._model.held, ids)
        try:
            candidates = self._candidates(entry, setting, ids) if self._scores_needed(options) else ()
            if options.decoding == "likelihood" and options.only is None:
                likeliest = max(candidates, key=lambda item: item.probability).tool_name
                constraint = self._constrainer.start([tool for tool in tools if tool.name == likeliest])
            before = time.perf_counter()
            reply = self._model.generate(ids, options.reply_tokens, constraint, True, self._watcher(options))
        except PetoolError as error:
            raise CallFailure(ENGINE, error.message, hint=error.hint) from error
        reply = replace(reply, reused_tokens=min(held, reply.reused_tokens))
        first = before - started + reply.prefill_s
        seconds = time.perf_counter() - started
        saved, warning = self._remember(user, ids[:prefix]) if user is not None else (0, "")
        call = parse_call(reply.text, tools, reply.finish)
        return CallReply(call, reply, first, seconds, dropped, candidates, saved, warning)

    def _watcher(self, options: CallOptions) -> Callable[[list[int]], None] | None:
        watch = options.watch
        return (lambda ids: watch(self._model.decode(ids))) if watch else None

    @staticmethod
    def _scores_needed(options: CallOptions) -> bool:
        return options.explain or options.decoding == "likelihood"

    def _prompt(self, entry: Entry, setting: str, options: CallOptions) -> tuple[list[int], int, int]:
        """Prompt ids, how much history they lost, and how many ids any query of this user shares."""
        layout = Layout(setting, self.style, self.n_ctx - options.reply_tokens)
        fitted = prompt_ids(self._chat, entry, layout)
        if fitted is None or (fitted[1] and not options.trim_history):
            length = len(self._chat.encode(prompt_text(self._chat, entry, layout)))
            hint = "allow old history to go (--trim-history), or open a larger context (--context)"
            raise PetoolError(
                f"{length:,} prompt tokens and {options.reply_tokens} for the reply exceed the context of "
                f"{self.n_ctx:,}" + ("" if fitted else " even without any history"),
                hint if fitted else "offer fewer tools, or open a larger context (--context)",
            )
        other = prompt_ids(self._chat, replace(entry, query=""), layout)
        return fitted[0], fitted[1], common_length(fitted[0], other[0] if other else [])

    def _candidates(self, entry: Entry, setting: str, ids: Sequence[int]) -> tuple[Candidate, ...]:
        """Every candidate with its full name's probability among the offered names, the likeliest first."""
        names = list(dict.fromkeys(tool.name for tool in entry.prompt(setting).tools))
        heads = [self._chat.encode(ToolCall(name, {}).to_json().removesuffix("}}")) for name in names]
        # The last token may join with what follows in a real answer, and the name has ended before it.
        scores = self._model.log_likelihoods(ids, [head[:-1] for head in heads])
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        found = [
            Candidate(name, weight / sum(weights), ratings_of(entry, setting, name))
            for name, weight in zip(names, weights, strict=True)
        ]
        return tuple(sorted(found, key=lambda item: -item.probability))

    def _key(self) -> StateKey:
        if self._memory.key is None:
            settings = self._model.settings
            self._memory.key = StateKey(
                model_sha256(self.path), self.n_ctx, settings.kv_type, settings.flash_attention, library_version()
            )
        return self._memory.key

    def _recall(self, user: str, ids: Sequence[int]) -> None:
        """Put the user's state into the engine's memory where that saves more reading than what is held."""
        with self._memory.store.open(user, self._key()) as state:
            self._memory.saved.pop(user, None)
            if state is None:
                return
            self._memory.saved[user] = state.ids
            if common_length(state.ids, ids) > common_length(self._model.held, ids):
                self._model.restore(state.ids, state.data)

    def _remember(self, user: str, prefix: list[int]) -> tuple[int, str]:
        """Keep the state after `prefix` for the user, unless that is what the file holds; bytes written, a warning."""
        if not prefix or self._memory.saved.get(user) == prefix:
            return 0, ""
        try:
            return self._memory.store.save(user, self._key(), prefix, self._model.state(len(prefix))), ""
        except OSError as error:
            return 0, f"not remembered for the next time: {error.strerror or error}"

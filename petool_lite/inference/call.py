"""From a user's words, tools and history to one typed answer: what `call`, `serve` and the Python API share.

from petool_lite import ToolCaller

with ToolCaller("model.q4_k_m.gguf") as caller:
    reply = caller.call("Show past rates of EUR.", tools=tools, history=history, user="ann")
    print(reply.answer.name, reply.answer.arguments)
"""

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from petool_lite.data import SETTINGS
from petool_lite.data.entries import DISLIKED, LIKED, Answer, Call, Entry, Tool, providers
from petool_lite.errors import USAGE, PetoolError
from petool_lite.inference.constrain import Constrainer, heated
from petool_lite.inference.llama import LlamaModel, Reply
from petool_lite.inference.llama_open import library_stamp, model_sha256, preload
from petool_lite.inference.parse import ENGINE, CallFailure, check_names, parse_call
from petool_lite.inference.request import request_entry, row_entry, with_published_prompt
from petool_lite.inference.schema import buildable
from petool_lite.inference.states import StateStore
from petool_lite.places import user_path
from petool_lite.prompt import render

DECODINGS = ("constrained", "free")
DEFAULT_CONTEXT = 8192  # tokens; a model made for less has less
REPLY_TOKENS = 512
_NAMED_FROM = 0.05  # candidates of this probability are named in a question
AUTO, REQUIRED, NONE = CHOICES = ("auto", "required", "none")  # whether a tool may, must or must not be called


@dataclass(frozen=True)
class Candidate:
    """An offered tool, or None for no tool, with its probability among them; and the earlier calls of its provider, how
    many had which verdict and what they were, the latest last."""

    name: str | None
    probability: float
    liked: int
    disliked: int
    used: int
    calls: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CallReply:
    """One answer, a call or a text, with what it took. Times in seconds; `first_token_s` runs from the request on.
    `confidence` is the calibrated probability of the chosen tool, or of none, see `Constraint`; None where decoding was
    free. `saved_bytes` were written to the user's memory; `warning` says why it could not be. `notes` say what of the
    tools' schemas the reply was not held to. `prompt` is the prompt's text, a piece a token, where it was explained."""

    answer: Answer
    reply: Reply
    first_token_s: float
    seconds: float
    history_dropped: int
    candidates: tuple[Candidate, ...] = ()
    saved_bytes: int = 0
    warning: str = ""
    notes: tuple[str, ...] = ()
    confidence: float | None = None
    unsure: bool = False
    prompt: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """ "call", "text", or "ask" for a call that is too unsure to be made: the user is to choose a candidate."""
        return "ask" if self.unsure else "call" if isinstance(self.answer, Call) else "text"

    @property
    def question(self) -> str:
        """What to ask the user where it is unsure which tool is meant."""
        likely = [item for item in self.candidates if item.probability >= _NAMED_FROM] or self.candidates[:1]
        named = ", ".join(f"{item.name or 'no tool'} ({100 * item.probability:.0f} %)" for item in likely)
        return f"Which tool do you mean: {named}?"

    def document(self, kept: str | None) -> dict[str, Any]:
        """What `call --json` prints: the answer, the id under which it is `kept`, and the facts."""
        call = asdict(self.answer) if isinstance(self.answer, Call) and not self.unsure else None
        text = {} if call else {"text": self.question if self.unsure else self.answer}
        return {"id": kept, "status": self.status, "call": call} | text | self.facts()

    def facts(self) -> dict[str, Any]:
        """What programs are told of it, beside the answer itself."""
        told = ("status", "confidence", "timings", "history_dropped", "saved_bytes", "warning", "notes")
        return {name: getattr(self, name) for name in told} | {"candidates": [asdict(one) for one in self.candidates]}

    @property
    def timings(self) -> dict[str, float]:
        """Tokens, seconds and rates, for people and programs."""
        reply, tokens = self.reply, len(self.reply.ids)
        counts = {"prompt_tokens": reply.prompt_tokens, "reused_tokens": reply.reused_tokens, "reply_tokens": tokens}
        times = {"first_token_s": self.first_token_s, "prefill_s": reply.prefill_s, "decode_s": reply.decode_s}
        rounded = {name: round(value, 4) for name, value in (times | {"seconds": self.seconds}).items()}
        read = reply.prompt_tokens - reply.reused_tokens
        parts = (("prefill", read, reply.prefill_s), ("decode", tokens, reply.decode_s))
        rates = {f"{part}_tokens_per_s": round(count / took, 1) if took else 0.0 for part, count, took in parts}
        return counts | {"forced_tokens": reply.forced_tokens} | rounded | rates


@dataclass(frozen=True)
class CallOptions:
    """How a call is made: `decoding` is one of DECODINGS, `choice` one of CHOICES; `only` names the tools that may be
    called (all stay in the prompt). A call whose confidence is under `at_least` comes back with the status "ask" and
    the candidates. `trim_history` lets old history go where the prompt exceeds the context. `reply_tokens` None is as
    many as there is room for. `watch` gets the reply's text as it grows; `check` is called before every batch, and what
    either raises ends the call. `setting` is of PEToolBench's prompts, None for the model's own."""

    decoding: str = "constrained"
    choice: str = AUTO
    only: tuple[str, ...] | None = None
    setting: str | None = None
    trim_history: bool = False
    explain: bool = False
    at_least: float = 0.0
    reply_tokens: int | None = REPLY_TOKENS
    watch: Callable[[str], None] | None = None
    check: Callable[[], None] | None = None


@dataclass(frozen=True)
class Request:
    """What a command line or a client asks; `entry` may be an object of `row_entry`. With an id in `kept`, the call of
    a `user` is kept under it, and what the user did earlier is recalled."""

    entry: Entry | Mapping[str, Any]
    options: CallOptions
    user: str | None = None
    kept: str | None = None


class ToolCaller(ExitStack):
    """A loaded model that answers with calls. Use as a context manager, or `close` it; only one thread may use it."""

    def __init__(self, model: str | Path, n_ctx: int = 0, style: str | None = None, store: StateStore | None = None):
        """Load a GGUF file; `n_ctx` tokens (0: 8,192 or its own), `style` instead of the file's. Raises PetoolError."""
        super().__init__()
        self.path = user_path(model)
        self._settings = preload(self.path)  # and meanwhile:
        for name in ("jinja2.sandbox", "numpy"):
            import_module(name)
        self._constrainer = Constrainer.of_file(self.path, lambda: self._model)
        self._chat = self._model.chat()
        self.n_ctx = self._model.n_ctx = n_ctx or min(self._model.train_ctx or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        own = {key.removeprefix("petool_lite."): value for key, value in self._model.metadata.items()}
        recorded = render.recorded_style(own.get("prompt_style"), own.get("prompt_layout"))
        self.style = style or recorded or "petool"
        # A model that this package did not train has not learned to say that no tool fits: it always calls one.
        self.may_decline = self.style == "petool" and recorded == "petool"
        # None: the file does not say, or the model learned all settings; then a request's own history tells.
        self.trained_setting = trained if (trained := own.get("setting")) in SETTINGS else None
        temperature = own.get("temperature", "")
        heat = float(temperature) if temperature.replace(".", "", 1).isdecimal() else 1.0
        # A probability as bench found that this model's are right; see `petool-lite bench report --calibrate`.
        self._calibrated = float if heat in (0.0, 1.0) else partial(heated, temperature=heat)
        self._store = store or StateStore()
        self._memory: Any = None  # see `answer`
        self._rendering = threading.Lock()  # a template renders one prompt at a time
        self._saved: dict[str, list[int]] = {}  # what the users' files hold, as far as they were read or written

    @cached_property
    def _model(self) -> LlamaModel:
        return self.enter_context(LlamaModel(self.path, settings=self._settings))

    def slots(self, count: int) -> list["ToolCaller"]:
        """Callers that share this one's context, each for a thread of its own; they end with this one, which is not to
        be used beside them. Each has room for `n_ctx` tokens. Raises PetoolError where there is no memory for them."""
        found = [copy.copy(self) for _ in range(count)]
        for caller, model in zip(found, self._model.slots(count), strict=True):
            caller._model = model
        return found

    def call(
        self, query: str, tools: Any, history: Any = (), user: str | None = None, options: CallOptions | None = None
    ) -> CallReply:
        """The answer to `query`. `tools` is a list in OpenAI's, MCP's or PEToolBench's form, `history` a list of OpenAI
        messages or of PEToolBench's earlier calls. With `user` (any text), what was read is kept on disk for the next
        time. Raises CallFailure for a reply that is no answer or a failing engine, PetoolError for a bad request."""
        return self.call_entry(request_entry(query, tools, history), user, options)

    def answer(self, request: Request) -> tuple[CallReply, str | None]:
        """The reply to `request`, and the id under which it is kept, if it is. Raises like `call`."""
        user, options, told = request.user, request.options, request.entry
        if not isinstance(told, Entry):
            told = row_entry(told, options.setting or self.trained_setting)
        if request.kept is None or user is None:
            return self.call_entry(told, user, options), None
        from petool_lite.memory.store import Memory, record_of

        self._memory = self._memory or Memory()
        entry = self._memory.use(lambda store: store.recalled(user, told)) or told
        # What is recalled never makes a prompt too long.
        trims = options.trim_history or len(entry.history) > len(told.history)
        reply = self.call_entry(entry, user, replace(options, trim_history=trims))
        record = record_of(request.kept, user, told, reply.answer, reply.confidence)
        kept = not reply.unsure and self._memory.use(lambda store: store.add([record]))
        return reply, request.kept if kept else None

    def call_entry(self, entry: Entry, user: str | None = None, options: CallOptions | None = None) -> CallReply:
        """Like `call`, for an entry."""
        options, started = options or CallOptions(), time.perf_counter()
        free = options.decoding == "free"
        if options.decoding not in DECODINGS:
            raise PetoolError(f"unknown decoding: {options.decoding}", f"one of: {', '.join(DECODINGS)}", USAGE)
        if options.at_least and free:
            raise PetoolError("how sure a free reply is cannot be told", "use constrained decoding", USAGE)
        if options.choice == NONE and not self.may_decline:
            raise PetoolError("tool_choice none: this model answers with a tool call and nothing else", "leave it out")
        check_names(entry.tools)
        if self.style == "published" and entry.published is None:
            wording = self._model.metadata.get("petool_lite.wording")
            entry = with_published_prompt(entry, wording, options.setting or self.trained_setting)
        with self._rendering:
            prompt = self._prompt(entry, options)
        if lost := sorted({*(options.only or ())} - {tool.name for tool in entry.tools}):
            raise PetoolError(f"a tool to call was not offered: {', '.join(lost)}", "name one of the tools")
        tools = tuple(tool for tool in entry.tools if options.only is None or tool.name in options.only)
        text = options.choice != REQUIRED and self.may_decline
        offered = () if options.choice == NONE else tools
        constraint = None if free else self._constrainer.start(offered, self.style, text)
        self._model.context.share(self._model, prompt.ids)
        if user is not None:
            self._recall(user, prompt.ids)
        room = self.n_ctx - len(prompt.ids)
        self._model.check, self._model.busy = options.check, True
        try:
            before = time.perf_counter()
            limit = min(room, options.reply_tokens or room)
            reply = self._model.generate(prompt.ids, limit, constraint, True, options.watch)
            sure = None if reply.confidence is None else self._calibrated(reply.confidence)
            unsure = sure is not None and sure < options.at_least
            called = constraint.call_share if constraint else 1.0
            candidates = self._candidates(entry, prompt.ids, tools, called) if unsure or options.explain else ()
        except PetoolError as error:
            raise CallFailure(ENGINE, error.message, hint=error.hint) from error
        finally:
            self._model.check, self._model.busy = None, False
        first, seconds = before - started + reply.prefill_s, time.perf_counter() - started
        saved, warning = self._remember(user, list(prompt.ids[: prompt.shared])) if user is not None else (0, "")
        answer = parse_call(reply.text, tools, reply.finish, text or (free and self.may_decline))
        notes = tuple(note for tool in tools for note in buildable(tool).notes) if constraint else ()
        unsure, dropped = unsure and isinstance(answer, Call), prompt.history_dropped
        shown = tuple(self._model.texts(prompt.ids)) if options.explain else ()
        return CallReply(answer, reply, first, seconds, dropped, candidates, saved, warning, notes, sure, unsure, shown)

    def _prompt(self, entry: Entry, options: CallOptions) -> render.Rendered:
        """The prompt's ids with room for a reply; where a long reply is allowed, it has what room there is."""
        reserve = min(options.reply_tokens or REPLY_TOKENS, REPLY_TOKENS)
        layout = render.Layout(self.style, self.n_ctx - reserve)
        fitted = render.prompt_ids(self._chat, entry, layout)
        if fitted is None or (fitted.history_dropped and not options.trim_history):
            length = len(self._chat.encode(render.prompt_text(self._chat, entry, layout)))
            what = f"{length:,} prompt tokens and {reserve} for the reply exceed the context of {self.n_ctx:,}"
            if fitted is None:
                raise PetoolError(f"{what} even without history", "offer fewer tools, or a larger context (--context)")
            raise PetoolError(what, "allow old history to go (--trim-history), or open a larger context (--context)")
        return fitted

    def _candidates(self, entry: Entry, ids: list[int], tools: Sequence[Tool], called: float) -> tuple[Candidate, ...]:
        """Every tool and, where a text may be the answer, no tool, likeliest first; `called`: the share of calls."""
        names = [tool.name for tool in tools]
        calls = [render.answer_text(Call(name, {}), self.style) for name in names]
        heads = [self._chat.encode(text.rpartition("{}")[0]) for text in calls]
        # The last token may join with what follows in a real answer, and the name has ended before it.
        shares = [share * called for share in self._model.shares(ids, [head[:-1] for head in heads])]
        every = dict(zip(names, shares, strict=True)) | ({None: 1 - called} if called < 1 else {})
        first, *others = sorted(every, key=lambda name: -every[name])
        sure = self._calibrated(every[first])
        rest = (1 - sure) / (1 - every[first]) if every[first] < 1 else 0.0
        known, found = providers(entry), []
        for name in (first, *others):
            made = [item for item in entry.history if name and known[item.call.name] == known[name]]
            liked, disliked, used = (sum(one.verdict == said for one in made) for said in (LIKED, DISLIKED, None))
            told = tuple({"query": item.query, "name": item.call.name, "verdict": item.verdict} for item in made)
            found.append(Candidate(name, sure if name == first else every[name] * rest, liked, disliked, used, told))
        return tuple(found)

    @cached_property
    def _key(self) -> dict[str, Any]:
        settings = self._model.settings
        engine = {"kv_type": settings.kv_type, "flash_attention": settings.flash_attention}
        return {"model_sha256": model_sha256(self.path), **engine, "library": library_stamp()}

    def _recall(self, user: str, ids: Sequence[int]) -> None:
        """Put the user's state into the engine's memory where that saves more reading than what is held."""
        self._saved.pop(user, None)
        if found := self._store.read(user, self._key):
            self._saved[user], data = found
            if render.common_length(self._saved[user], ids) > render.common_length(self._model.held, ids):
                self._model.restore(self._saved[user], data)

    def _remember(self, user: str, prefix: list[int]) -> tuple[int, str]:
        """Keep the state after `prefix` for the user, unless that is what the file holds; bytes written, a warning."""
        if not prefix or self._saved.get(user) == prefix:
            return 0, ""
        try:
            return self._store.save(user, self._key, prefix, self._model.state(len(prefix))), ""
        except OSError as error:
            return 0, f"what was read is not kept for the next call: {error.strerror or error}"

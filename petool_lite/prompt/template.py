"""Chat templates, which come with a model from somebody else: rendered in a sandbox that bounds what they may cost.
Beyond jinja's own: turns of loops and calls are counted, numbers cannot grow without end, memory is limited."""

import contextlib
import hashlib
import json
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from time import thread_time
from typing import Any

from jinja2 import DictLoader, FileSystemBytecodeCache, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from petool_lite.errors import PetoolError, first_line
from petool_lite.places import own_folder

_LONGEST = 1 << 18  # characters of a template; Llama 3's has 3,800
_STEPS = 200_000  # turns of loops, and calls, of one rendering
_SECONDS = 3.0  # of computing: a busy machine refuses no template that another one renders
_MEMORY = 1 << 30  # bytes beyond what the process has when a rendering starts
# What faulty expressions of a template raise beside jinja's own errors.
_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, SyntaxError)
_OF_DICTS = frozenset(dir(dict))
_TRUST = "get the model from a source that you trust"
_REPEAT = 100_000  # of a text or list by *, and of a number that is handed to a method or filter


class _GenerationTag(Extension):
    """Reads {% generation %}, by which some templates mark what a model is to learn, as what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])
    steps, end = 0, 0.0  # of one rendering: turns and calls so far, and when it must be done

    def step(self) -> bool:
        self.steps += 1
        if self.steps > _STEPS or (self.steps % 32 == 0 and thread_time() > self.end):
            raise PetoolError("the chat template does not come to an end", _TRUST)
        return True

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What the sandbox finds out in ten times the time: a name that no dict has is a key of this one.
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is Namespace and attribute[:1] != "_":
            with contextlib.suppress(AttributeError):
                return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [item for item in (left, right) if isinstance(item, int)]
        plain = all(isinstance(item, int | float) for item in (left, right))
        if operator == "**" or any(abs(item) > (1 << 62 if plain else _REPEAT) for item in sizes):
            raise SecurityError(f"{operator} with such a number")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.step()
        numbers = () if isinstance(__obj, Macro) else (*args, *kwargs.values())
        if any(isinstance(item, int) and abs(item) > _REPEAT for item in numbers):
            raise SecurityError("a call with such a number")
        return super().call(__context, __obj, *args, **kwargs)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template and its environment; compiled once, and kept for the next process: compiling it takes 0.04 s."""
    if len(template) > _LONGEST:
        raise PetoolError(f"the chat template has {len(template):,} characters, more than {_LONGEST:,}")
    name = hashlib.sha256(Path(__file__).read_bytes() + template.encode()).hexdigest()
    folder = own_folder("templates")
    tags = ["jinja2.ext.loopcontrols", _GenerationTag]
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
    environment.loader = DictLoader({name: template})
    environment.bytecode_cache = FileSystemBytecodeCache(str(folder)) if folder else None
    environment.filters["counted"] = lambda items: (item for item in items if environment.step())
    # as transformers and llama.cpp do it: no escapes for HTML, which jinja's own filter writes
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    del environment.globals["lipsum"]
    with contextlib.suppress(OSError):  # a full disk costs the next process its time, and this one nothing
        return environment, environment.get_template(name)
    environment.bytecode_cache = None
    return environment, environment.get_template(name)


def render_template(template: str, date: Callable[[str], str], **values: Any) -> str:
    """The text that `template` makes of `values`; `date` is its strftime_now. Not for two threads at once. Raises
    PetoolError for a template that is faulty, refuses the messages, or takes more time or memory than any needs."""

    def refuse(message: str) -> None:
        raise PetoolError(f"the chat template refuses these messages: {message}")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):  # where the system says what the process has (Linux), it may take this more
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        try:
            environment, compiled = _compiled(template)
            environment.steps, environment.end = 0, thread_time() + _SECONDS
            return str(compiled.render(**values, raise_exception=refuse, strftime_now=date))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (MemoryError, OverflowError) as error:
        raise PetoolError("the chat template takes too much memory", _TRUST) from error
    except (*_FAULTS, TemplateError) as error:
        raise PetoolError(f"the model's chat template does not work: {first_line(error)}") from error

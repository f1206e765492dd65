"""Checks of a finished GGUF: ids as in training, answers as the merged model's in transformers, replies that end."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from petool_lite.console import Report
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.petoolbench import published_entry
from petool_lite.errors import PetoolError
from petool_lite.export.source import Source, nf4_round_trip
from petool_lite.families import gguf_name
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import Base
from petool_lite.places import default_threads
from petool_lite.prompt import render
from petool_lite.prompt.prepare import prepare
from petool_lite.prompt.render import Example, Layout, chat_from_directory
from petool_lite.recipe import Recipe

Trial = tuple[list[tuple[dict[str, Any], str]], list[Example], str]
PROMPTS, REPLIES = 50, 20
_CONSIDERED = 200  # held-out entries among which the shortest are taken
STOPPED = 0.9  # share of greedy replies that must end by themselves
# GGUF type -> least top-1 agreement and largest mean KL divergence (nats a token) on answer tokens
_LIMITS = {"bf16": (0.98, 0.01), "f16": (0.98, 0.01), "q8_0": (0.97, 0.02), "q6_k": (0.96, 0.03)}
_LOW_BITS = (0.9, 0.15)
_LARGE = 1_000_000_000  # weights from which layers run in bfloat16 on a CPU: float32 would take minutes
_HEAD_ROWS = 8192  # rows of the output head in float32 at once
TOKENS = 32_768  # of training rows, prompts and answers


class Reference:
    """Base + adapter, or the model of its own, on the GPU if there is room, else in this process's memory."""

    def __init__(self, source: Source) -> None:
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        with redirect_stderr(io.StringIO()):  # these libraries print which optional parts they lack, and bars
            import torch
            from accelerate import cpu_offload
            from transformers import AutoModelForCausalLM

            self._source, self._tensors = source, source.tensors
            size = sum(math.prod(tensor.shape) for tensor in self._tensors.values())
            gpu = torch.cuda.is_available()
            dtype = torch.bfloat16 if gpu or size >= _LARGE else torch.float32
            folder = next(iter(self._tensors.values())).file.parent
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
            if source.adapter is not None:
                for name in source.adapter.modules:
                    weight = self._tensors[name].read()
                    before = nf4_round_trip(weight).float() if source.nf4 else weight
                    model.get_parameter(name).copy_(before + source.adapter.delta(name))
            self._model = model.model
            if gpu and 2.5 * size < torch.cuda.mem_get_info()[0]:
                self._model.to("cuda")
            elif gpu:  # matrices come from the CPU's memory, one at a time
                cpu_offload(self._model, "cuda:0")

    def _states(self, ids: Sequence[int]) -> Any:
        """The last hidden states of a row, (tokens, width)."""
        import torch

        with torch.no_grad():
            row = torch.tensor([list(ids)], device="cuda" if torch.cuda.is_available() else "cpu")
            return self._model(row, use_cache=False).last_hidden_state[0]

    def answer_logits(self, rows: Sequence[Example], report: Report) -> list[Any]:
        """Logits that predict each answer token of `rows`: float32 numpy arrays (answer tokens, vocabulary)."""
        import torch

        head = self._tensors.get("lm_head.weight", self._tensors["model.embed_tokens.weight"])
        ends, found = [*range(0, head.rows, _HEAD_ROWS), head.rows], []
        for number, row in enumerate(rows, 1):
            states = self._states(row.ids)[row.answer_start - 1 : -1].float().cpu()
            parts = [states @ head.read(first, last).T for first, last in pairwise(ends)]
            found.append(torch.cat(parts, dim=1).numpy())
            report("running the merged model", number, len(rows), "")
        return found

    def mean_squares(self, rows: Sequence[Sequence[int]], report: Report) -> dict[str, Any]:
        """An importance matrix as llama.cpp defines it: GGUF name -> mean squared inputs, float32 numpy (columns,)."""
        import torch

        sums: dict[str, Any] = {}

        def add(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0.0) + inputs[0][0].double().square().sum(dim=0).cpu()

        for name, module in self._model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                tensor = gguf_name(f"model.layers.{name}.weight", self._source.shape)
                module.register_forward_pre_hook(partial(add, tensor))
        for number, row in enumerate(rows, 1):
            self._states(row)
            report("measuring importance", number, len(rows), "")
        total = sum(map(len, rows))
        return {name: (values / total).float().numpy() for name, values in sums.items()}


def importance(source: Source, recipe: Recipe, report: Report) -> dict[str, Any]:
    """GGUF tensor name -> float32 array (columns,)."""
    prepared = prepare(recipe, source.base, chat_from_directory(source.base.directory), report)
    step = max(1, prepared.summary["tokens"] // TOKENS)
    return Reference(source).mean_squares(prepared.table["input_ids"][::step], report)  # from all over the data


def trial(base: Base, recipe: Recipe, wording: Mapping[str, Sequence[str]], report: Report) -> Trial:
    """Requests with their texts for token ids, the shortest rows with answers, and the data's name: of the recipe's own
    held-out entries, filled up with generated ones. `wording` is that of the run's published prompts, by setting."""
    chat = chat_from_directory(base.directory)
    data, name, setting = recipe.data, recipe.bench.data, recipe.data.one_setting
    made: Sequence[Entry] = load_dataset(f"demo:test:{PROMPTS}").entries
    try:
        entries: Sequence[Entry] = load_dataset(name, setting).entries[:_CONSIDERED]
    except PetoolError as error:  # a run may be exported where its test data is not
        entries, name = made, f"demo:test:{PROMPTS}"
        report(f"checking with generated entries, since {error.message}", 0, 0, "")

    def asked(entry: Entry) -> Entry:
        plain = data.style == "published" and not entry.published
        return published_entry(entry, wording.get(setting, ("", "", "")), setting) if plain else entry

    layout = Layout(data.style, recipe.model.max_tokens)
    requests = [render.entry_request(chat, asked(entry), data.style) for entry in [*entries, *made][:PROMPTS]]
    texts = [(request, render.render_messages(chat, **request)) for request in requests]
    usable = [entry for entry in entries if isinstance(entry.answer, Call)] or made
    rows = [row for row in render.examples(chat, [*map(asked, usable)], layout) if row is not None]
    return texts, sorted(rows, key=lambda row: len(row.ids))[:REPLIES], name


class OtherServer:
    """llama.cpp's own HTTP server over one GGUF file, where xllamacpp is installed; it ends when the object goes."""

    def __init__(self, file: Path, n_ctx: int = 512, template: str = "") -> None:
        """Load `file`; `template` replaces the file's own chat template."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.offline = str(file), n_ctx, 1, True
        params.cpuparams.n_threads, params.warmup, params.use_jinja = default_threads(), False, True
        params.chat_template, params.verbosity = template, 0
        self._server = xllamacpp.Server(params)
        self.url: str = self._server.listening_address

    @staticmethod
    def installed() -> bool:
        """Whether xllamacpp is there."""
        return find_spec("xllamacpp") is not None

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers to a request at `path`, as a JSON value."""
        import httpx

        return httpx.post(f"{self.url}{path}", json=body, timeout=300).raise_for_status().json()

    def text(self, body: Mapping[str, Any]) -> str:
        """The prompt that it makes of messages and tools."""
        return str(self.ask("/apply-template", body)["prompt"])

    def ids(self, body: Mapping[str, Any]) -> list[int]:
        """The token ids of that prompt."""
        asked = {"content": self.text(body), "add_special": True, "parse_special": True}
        return [int(token) for token in self.ask("/tokenize", asked)["tokens"]]


def check_files(
    paths: Mapping[str, Path], source: Source, tried_on: Trial, max_reply: int | None, report: Report
) -> dict[str, dict[str, Any]]:
    """The figures of each file, by type; `max_reply` None runs no model. Raises PetoolError that names each fault."""
    asked, rows, _ = tried_on
    figures: dict[str, dict[str, Any]] = {}
    smallest = min(paths, key=lambda name: paths[name].stat().st_size)  # all have the same template
    for number, (name, path) in enumerate(paths.items(), 1):
        server = OtherServer(path) if name == smallest and OtherServer.installed() else None
        check_ids(path, source, asked, server)
        figures[name] = {"prompts_with_equal_ids": len(asked)}
        figures[name] |= {"prompts_llama_cpp_renders_alike": len(asked)} if server else {}
        report("checking token ids", number, len(paths), name)
    if max_reply is None:
        return figures
    wanted = Reference(source).answer_logits(rows, report)
    for name, path in paths.items():
        logits, ended = list[Any](), 0
        with Evaluator(path, max(len(row.ids) for row in rows) + max_reply + 1) as model:
            for number, row in enumerate(rows, 1):
                found, stopped = model.run(row.ids[: row.answer_start], row.ids[row.answer_start :], max_reply)
                logits, ended = [*logits, found], ended + stopped
                report(f"running {name} in llama.cpp", number, len(rows), "")
        figures[name] |= {"replies": len(rows), "replies_stopped": ended}
        figures[name] |= {"against_transformers": agreement(wanted, logits)}
    if faults := [fault for name, found in figures.items() for fault in shortfalls(name, found)]:
        hint = "train longer, or take a larger type; --verify quick leaves out what runs the model"
        raise PetoolError("the export is not right: " + "; ".join(faults), hint)
    return figures


def check_ids(path: Path, source: Source, asked: Sequence[tuple[Any, str]], server: OtherServer | None = None) -> None:
    """Raise PetoolError, with the first differing token, for a text that has other ids in llama.cpp than in training or
    transformers, or is not what `server` makes of its request; and for another chat template or end token."""
    from transformers import AutoTokenizer

    trained = chat_from_directory(source.base.directory)
    template = trained.template if source.template is None else source.template
    tokenizer = AutoTokenizer.from_pretrained(source.base.directory)
    with LlamaModel(path, vocab_only=True) as model:
        if (model.chat().template, model.chat().eos_id) != (template, trained.eos_id):
            raise PetoolError(f"{path.name}: chat template or end token differ from the base's")
        for request, text in asked:
            ids = model.encode(text)
            others = {
                "training": trained.encode(text),
                "transformers": tokenizer.encode(text, add_special_tokens=False),
            }
            others |= {"llama.cpp's server": server.ids(request)} if server else {}
            if name := next((name for name, other in others.items() if other != ids), None):
                sides = ids, others[name]
                at, (one, two) = render.common_length(*sides), map(len, sides)
                shown = [f"{side[at]} {model.decode([side[at]])!r}" if at < len(side) else "nothing" for side in sides]
                what = f"{path.name}: llama.cpp and {name} disagree on a prompt: token {at} of {one} and {two}"
                raise PetoolError(f"{what} is {shown[0]} and {shown[1]}")


class Evaluator(LlamaModel):
    """One GGUF file: logits of every token of given answers, which scoring does not need, and greedy replies."""

    def run(self, prompt: list[int], answer: Sequence[int], max_reply: int) -> tuple[Any, bool]:
        """Float32 numpy logits (answer tokens, vocabulary), and whether the greedy reply ends within `max_reply`."""
        import numpy as np

        self.read(prompt, reuse=False)
        rows, read, step = [self._logits().copy()], answer[:-1], self.settings.ubatch
        for first in range(0, len(read), step):
            self._eval(read[first : first + 1], read[first + 1 : first + step])
            rows += [row.copy() for row in self._rows]
        return np.stack(rows), self.generate(prompt, max_reply, reuse=True).finish == "stop"


def agreement(wanted: Sequence[Any], found: Sequence[Any]) -> dict[str, Any]:
    """Over all answer tokens: how often the likeliest token is the same, and the mean KL(wanted || found) in nats."""
    import torch
    from torch.nn.functional import kl_div

    logs = [torch.cat([torch.as_tensor(row) for row in rows]).double().log_softmax(1) for rows in (wanted, found)]
    same = (logs[0].argmax(1) == logs[1].argmax(1)).double().mean()
    divergence = kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)
    return {"tokens": len(logs[0]), "top1": round(float(same), 4), "kl": float(f"{divergence:.3g}")}


def shortfalls(name: str, figures: dict[str, Any]) -> list[str]:
    """What of a file's figures lies below its threshold, in words."""
    faults, against = [], figures["against_transformers"]
    stopped, count = figures["replies_stopped"], figures["replies"]
    if stopped < STOPPED * count:
        faults.append(f"{stopped} of {count} greedy replies stop at the end token, fewer than {STOPPED:.0%}")
    least, most = _LIMITS.get(name, _LOW_BITS)
    if against["top1"] < least:
        faults.append(f"top-1 agreement with transformers {against['top1']}, below {least}")
    if not against["kl"] <= most:
        faults.append(f"KL divergence from transformers {against['kl']}, above {most}")
    return [f"{name}: {fault}" for fault in faults]

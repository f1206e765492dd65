"""What `cpu_speed` runs in processes of their own: `python dev/cpu_steps.py WAY SCENE.json`; answers a line of JSON.

A scene (`cpu_speed.scene`) has requests, their prompts and the most tokens of each reply. The answer is a list with
what each request took: seconds to the first token and to the whole reply, tokens read anew and tokens replied.
"""

import argparse
import http.client
import json
import os
import time
from pathlib import Path
from typing import Any

CONTEXT = 8192
Row = dict[str, Any]


def ours_in_one_process(scene: Row) -> list[Row]:
    """The Python API, one loaded model: the first request is a new user's."""
    from petool_lite import ToolCaller
    from petool_lite.inference.call import AUTO, REQUIRED, CallOptions
    from petool_lite.inference.request import row_entry

    found, choice = [], REQUIRED if scene["required"] else AUTO
    with ToolCaller(scene["model"], CONTEXT, style=scene["style"]) as caller:
        for request, limit in zip(scene["requests"], scene["limits"], strict=True):
            started = time.perf_counter()
            reply = caller.call_entry(row_entry(request), "in-process", CallOptions(choice=choice, reply_tokens=limit))
            whole = time.perf_counter() - started
            found.append({"first": reply.first_token_s, "whole": whole, **tokens_of(reply.timings)})
    return found


def tokens_of(timings: Row) -> Row:
    """Tokens that a call of ours read and replied."""
    return {"read": timings["prompt_tokens"] - timings["reused_tokens"], "tokens": timings["reply_tokens"]}


def peer(model: str, context: int, slots: int = 1, folder: str = "") -> Any:
    """llama.cpp's own server as xllamacpp holds it, running in this process; `folder` is where it may save slots."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.offline = model, context, slots, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    params.warmup, params.verbosity, params.use_jinja, params.endpoint_slots = False, 0, True, True
    params.slot_save_path = folder and f"{folder}/"
    return xllamacpp.Server(params)


class Server:
    """llama.cpp's own server, asked over a plain connection."""

    def __init__(self, scene: Row) -> None:
        """Load; the slot is saved to and restored from the folder of the scene."""
        self._server, self._schema = peer(scene["model"], CONTEXT, folder=scene["folder"]), scene["schema"]
        self._place = self._server.listening_address.removeprefix("http://")

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to one request; one that it refuses ends the measurement."""
        line = http.client.HTTPConnection(self._place)
        line.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        found = json.load(line.getresponse())
        assert "error" not in found, f"{path}: {found}"
        return found

    def call(self, prompt: str, limit: int) -> Row:
        """A constrained call after the prompt, which ends with the mark that starts a call."""
        own, started = {"temperature": 0, "cache_prompt": True, "id_slot": 0}, time.perf_counter()
        found = self.ask("/completion", prompt=prompt, n_predict=limit, json_schema=self._schema, **own)["timings"]
        seconds, tokens = time.perf_counter() - started, {"read": found["prompt_n"], "tokens": found["predicted_n"]}
        return {"first": seconds - found["predicted_ms"] / 1000, "whole": seconds, **tokens}


def server_warm(scene: Row) -> list[Row]:
    """All requests to one server; after the first its slot's state of the user alone is saved."""
    server = Server(scene)
    (first, limit), *rest = zip(scene["prompts"], scene["limits"], strict=True)
    found = [server.call(first, limit)]
    server.call(scene["prefix"], 0)
    server.ask("/slots/0?action=save", filename="user.bin")
    return found + [server.call(*each) for each in rest]


def server_new(scene: Row) -> list[Row]:
    """One request to a server that has just started and restored the user's state."""
    server = Server(scene)
    server.ask("/slots/0?action=restore", filename="user.bin")
    return [server.call(scene["prompts"][-1], scene["limits"][-1])]


def python_peer(scene: Row) -> list[Row]:
    """llama-cpp-python's create_chat_completion in one process, with the prompt's own text.

    It is told which tool is right, so that its grammar has nothing to choose; and it is guarded against AMX crashes.
    """
    import llama_cpp
    from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

    original = llama_cpp.llama_cpp.llama_model_default_params

    def guarded() -> Any:
        options = original()
        options.use_extra_bufts = False
        return options

    llama_cpp.llama_cpp.llama_model_default_params = guarded
    cores, seen, found = len(os.sched_getaffinity(0)), list[float](), list[Row]()
    model = llama_cpp.Llama(scene["model"], n_ctx=CONTEXT, n_threads=cores, n_threads_batch=cores, verbose=False)

    def watch(ids: Any, scores: Any) -> Any:  # runs just before a token is chosen
        seen.append(time.perf_counter())
        return scores

    for text, request, limit in zip(scene["prompts"], scene["requests"], scene["limits"], strict=True):
        model.chat_handler = chat_formatter_to_chat_completion_handler(
            lambda text=text, **_: ChatFormatterResponse(prompt=text, stop="<|im_end|>", added_special=True)
        )
        seen.clear()
        started = time.perf_counter()
        model.create_chat_completion(
            [{"role": "user", "content": request["query"]}], tools=scene["openai"], tool_choice=scene["choice"],
            temperature=0.0, max_tokens=limit, logits_processor=[watch],
        )  # fmt: skip
        found.append({"first": seen[0] - started, "whole": time.perf_counter() - started, "tokens": len(seen)})
    return found


WAYS = {function.__name__: function for function in (ours_in_one_process, server_warm, server_new, python_peer)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("scene", metavar="SCENE.json", type=Path)
    asked = parser.parse_args()
    print(json.dumps(WAYS[asked.way](json.loads(asked.scene.read_text()))), flush=True)
    os._exit(0)  # none of them is charged for taking itself apart

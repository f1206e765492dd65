"""What `cpu_speed` runs in processes of their own: `python dev/cpu_steps.py WAY SCENE.json`; answers a line of JSON.

A scene is a JSON object: model, requests (each with query, tools, history), what the published or the petool prompt
makes of them (prompts, prefix), and a JSON Schema of all calls for llama.cpp's server.
"""

import argparse
import http.client
import json
import os
import time
from pathlib import Path
from typing import Any

CONTEXT, REPLY = 8192, 160


def ours_in_one_process(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """The Python API, one loaded model: the first request is a new user's."""
    from petool_lite import ToolCaller
    from petool_lite.inference.call import AUTO, REQUIRED, CallOptions
    from petool_lite.inference.request import row_entry

    options, found = CallOptions(choice=REQUIRED if scene["required"] else AUTO, reply_tokens=REPLY), []
    with ToolCaller(scene["model"], CONTEXT, style=scene["style"]) as caller:
        for request in scene["requests"]:
            started = time.perf_counter()
            reply = caller.call_entry(row_entry(request), "in-process", options)
            seconds = time.perf_counter() - started
            found.append({"first": reply.first_token_s, "whole": seconds, "reply": reply.reply.text})
    return found


class Server:
    """llama.cpp's own server as xllamacpp holds it, asked over a plain connection."""

    def __init__(self, scene: dict[str, Any]) -> None:
        """Load; the slot is saved to and restored from the folder of the scene."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.offline = scene["model"], CONTEXT, 1, True
        params.cpuparams.n_threads = len(os.sched_getaffinity(0))
        params.warmup, params.verbosity, params.endpoint_slots = False, 0, True
        params.slot_save_path = scene["folder"] + "/"
        self._server, self._schema = xllamacpp.Server(params), scene["schema"]
        self._place = self._server.listening_address.removeprefix("http://")

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to one request."""
        line = http.client.HTTPConnection(self._place)
        line.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return json.load(line.getresponse())

    def call(self, prompt: str) -> dict[str, Any]:
        """A constrained call after the prompt, which ends with the mark that starts a call."""
        body = {"prompt": prompt, "temperature": 0, "cache_prompt": True, "id_slot": 0, "n_predict": REPLY}
        started = time.perf_counter()
        found = self.ask("/completion", body | {"json_schema": self._schema})
        seconds = time.perf_counter() - started
        return {"first": seconds - found["timings"]["predicted_ms"] / 1000, "whole": seconds, "reply": found["content"]}


def server_warm(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """All requests to one server; after the first its slot's state of the user alone is saved."""
    server = Server(scene)
    found = [server.call(scene["prompts"][0])]
    server.ask("/completion", {"prompt": scene["prefix"], "cache_prompt": True, "id_slot": 0, "n_predict": 0})
    server.ask("/slots/0?action=save", {"filename": "user.bin"})
    return found + [server.call(prompt) for prompt in scene["prompts"][1:]]


def server_new(scene: dict[str, Any]) -> list[dict[str, Any]]:
    """One request to a server that has just started and restored the user's state."""
    server = Server(scene)
    server.ask("/slots/0?action=restore", {"filename": "user.bin"})
    return [server.call(scene["prompts"][scene["place"]])]


def python_peer(scene: dict[str, Any]) -> list[dict[str, Any]]:
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
    cores, seen, found = len(os.sched_getaffinity(0)), list[float](), list[dict[str, Any]]()
    peer = llama_cpp.Llama(scene["model"], n_ctx=CONTEXT, n_threads=cores, n_threads_batch=cores, verbose=False)

    def watch(ids: Any, scores: Any) -> Any:  # runs just before a token is chosen
        seen.append(time.perf_counter())
        return scores

    for text, request in zip(scene["prompts"], scene["requests"], strict=True):
        peer.chat_handler = chat_formatter_to_chat_completion_handler(
            lambda text=text, **_: ChatFormatterResponse(prompt=text, stop="<|im_end|>", added_special=True)
        )
        seen.clear()
        started = time.perf_counter()
        reply = peer.create_chat_completion(
            [{"role": "user", "content": request["query"]}], tools=scene["openai"], tool_choice=scene["choice"],
            temperature=0.0, max_tokens=REPLY, logits_processor=[watch],
        )  # fmt: skip
        seconds = time.perf_counter() - started
        message = reply["choices"][0]["message"]
        found.append({"first": seen[0] - started, "whole": seconds, "reply": json.dumps(message)})
    return found


WAYS = {function.__name__: function for function in (ours_in_one_process, server_warm, server_new, python_peer)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("scene", metavar="SCENE.json", type=Path)
    asked = parser.parse_args()
    print(json.dumps(WAYS[asked.way](json.loads(asked.scene.read_text()))), flush=True)
    os._exit(0)  # none of them is charged for taking itself apart

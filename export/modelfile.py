"""An Ollama Modelfile whose template is the chat template itself, rendered once around placeholders."""

import json
from pathlib import Path

from petool_lite.models import Base, gguf_fields, open_gguf
from petool_lite.prompt.render import Chat, chat_from_directory, render

_SYSTEM, _USER = "petoolsystemplaceholder", "petooluserplaceholder"


def modelfile(gguf: Path, base: Base, max_tokens: int) -> str:
    """The Modelfile's text for the file `gguf`, which lies beside it; greedy, stopping at the model's end tokens.

    `max_tokens` is the context in tokens. The template covers one system message and one user message, which is what
    petool-lite's prompts are.
    """
    chat = chat_from_directory(base.directory)
    fields = gguf_fields(open_gguf(gguf))
    lines = [
        f"FROM ./{gguf.name}",
        f'TEMPLATE """{template(chat, adds_start(fields))}"""',
        *(f"PARAMETER stop {json.dumps(token)}" for token in stop_tokens(chat, base, fields["tokenizer.ggml.tokens"])),
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {max_tokens}",
    ]
    return "\n".join(lines) + "\n"


def adds_start(fields: dict[str, object]) -> bool:
    """Whether llama.cpp puts the start token before a text by itself, from a GGUF's keys."""
    return bool(fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.pre") == "llama-bpe"))


def template(chat: Chat, start_is_added: bool) -> str:
    """Ollama's (Go) template for `chat`; without a system message, what the chat template says then."""
    system = {"role": "system", "content": _SYSTEM}
    user = {"role": "user", "content": _USER}
    texts = []
    for messages in ([system, user], [user]):
        text = render(chat, messages)
        if start_is_added and chat.bos_token:
            text = text.removeprefix(chat.bos_token)
        text = text.replace("{{", '{{ "{{" }}')
        texts.append(text.replace(_SYSTEM, "{{ .System }}").replace(_USER, "{{ .Prompt }}"))
    return "{{ if .System }}" + texts[0] + "{{ else }}" + texts[1] + "{{ end }}{{ .Response }}"


def stop_tokens(chat: Chat, base: Base, tokens: list[str]) -> list[str]:
    """The end token, then those that the base's generation settings add."""
    file = base.directory / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id", []) if file.is_file() else []
    others = [tokens[index] for index in (ends if isinstance(ends, list) else [ends])]
    return list(dict.fromkeys([chat.eos_token, *others]))

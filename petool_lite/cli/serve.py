"""`petool-lite serve`: an OpenAI-compatible server over a GGUF file on this CPU."""

from typing import Any

import click

from petool_lite.cli.call import (
    chosen_model,
    context_option,
    decoding_option,
    mcp_option,
    model_option,
    store_option,
    trim_option,
)


@click.command()
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Any but a loopback address needs an API key.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option(
    "--api-key", envvar="PETOOL_LITE_API_KEY", default=None, help="What clients must send; better in the environment."
)
@click.option(
    "--slots",
    default=1,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Requests that run at once; each takes the memory of a context.",
)
@click.option("--queue", default=8, show_default=True, type=click.IntRange(min=1), help="Requests that may wait.")
@click.option(
    "--timeout",
    "timeout_s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds, waiting included.",
)
@click.option(
    "--max-request", "max_mb", default=4, show_default=True, type=click.IntRange(min=1), help="MiB of one request."
)
@decoding_option
@trim_option
@context_option
@store_option
@mcp_option
def serve(**options: Any) -> None:
    """Serve /v1/chat/completions, /v1/responses, /v1/feedback, /v1/models and /health for OpenAI clients."""
    from petool_lite.serve import ServeSettings, run

    run(ServeSettings(**options | {"model": chosen_model(options["model"])}))

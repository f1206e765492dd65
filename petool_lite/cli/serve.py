"""`petool-lite serve`: an OpenAI-compatible server over a GGUF file on this CPU."""

from typing import Any

import click

from petool_lite.cli.options import chosen_model, engine_options


@click.command()
@engine_options
@click.option("--host", default="127.0.0.1", help="Any but a loopback address needs an API key.")
@click.option("--port", default=8080, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--api-key", envvar="PETOOL_LITE_API_KEY", help="What clients must send; better in the environment.")
@click.option("--slots", default=1, type=click.IntRange(1, 64), help="Requests at once; each takes a context's memory.")
@click.option("--queue", default=8, type=click.IntRange(min=1), help="Requests that may wait.")
@click.option("--timeout", "timeout_s", default=300.0, type=click.FloatRange(min=0.1), help="Seconds, with waiting.")
@click.option("--max-request", "max_mb", default=4, type=click.IntRange(min=1), help="MiB of one request.")
def serve(**options: Any) -> None:
    """Serve /v1/chat/completions, /v1/responses, /v1/feedback, /v1/models and /health for OpenAI clients."""
    from petool_lite.serve import ServeSettings, run

    run(ServeSettings(**options | {"model": chosen_model(options["model"])}))

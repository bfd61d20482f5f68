"""`distilbert-fast serve`: models over HTTP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbert_fast.cli.errors import plain_errors

EPILOG = """\
[bold]Examples[/bold]

Embeddings for clients of OpenAI and of text-embeddings-inference (pip install 'distilbert-fast\\[serve]'):

    distilbert-fast serve --model ./minilm --precision int8
    curl http://127.0.0.1:8080/v1/embeddings -d '{"model": "minilm", "input": ["a charming journey"]}'
    curl http://127.0.0.1:8080/embed -d '{"inputs": "a charming journey"}'

Several models; each answers what it has the head for, or is asked by its name:

    distilbert-fast serve --model ./minilm --model cross=./reranker --model ./sst2 --model ./ner --model ./qa
    curl http://127.0.0.1:8080/rerank -d '{"query": "a film", "texts": ["a charming journey", "a hammer"]}'
    curl http://127.0.0.1:8080/predict -d '{"inputs": "a charming journey", "model": "sst2"}'
    curl http://127.0.0.1:8080/tag -d '{"inputs": "Ada Lovelace lived in London."}'
    curl http://127.0.0.1:8080/qa -d '{"inputs": {"question": "Where?", "context": "Ada Lovelace lived in London."}}'

For other machines, with a token; several servers of one machine that hold the weights in memory once:

    DISTILBERT_FAST_API_KEY=… distilbert-fast serve --model ./minilm --host 0.0.0.0 --packed /var/cache/packed

/docs lists all routes, /metrics is for Prometheus, /health answers 200 once the models are warm. SIGTERM or Ctrl-C \
stops the server after it has answered what it has taken.
"""
_WHO, _LIMITS, _SPEED, _SCALE = "Who may ask", "Limits", "Speed", "Several machines"


def serve(
    model: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]DIR_OR_ID", help="A BERT, RoBERTa or DistilBERT; give it again for more."),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]TASK",
            help="text-classification, regression, embedding, token-classification, question-answering or reranking; "
            "by default what the model has the head for.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.", rich_help_panel=_WHO)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", rich_help_panel=_WHO)] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File whose first line is the token that clients must send (Authorization: Bearer …); by default that "
            "of the environment variable DISTILBERT_FAST_API_KEY, or none.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log/--no-access-log",
            help="Write a line for each request to stderr, without texts.",
            rich_help_panel=_WHO,
        ),
    ] = True,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Seconds from a request to its answer; after them the answer is 504. Clients may ask for fewer by "
            "X-Request-Timeout.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    queue_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that may wait; what comes beyond them gets 429 with Retry-After.", rich_help_panel=_LIMITS
        ),
    ] = None,
    body_bytes: Annotated[
        int | None, typer.Option(help="The most bytes of a request; larger ones get 413.", rich_help_panel=_LIMITS)
    ] = None,
    inputs: Annotated[
        int | None, typer.Option(help="The most texts of a request; larger ones get 413.", rich_help_panel=_LIMITS)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="The most tokens of a text; by default what the models read.", rich_help_panel=_LIMITS),
    ] = None,
    auto_truncate: Annotated[
        bool,
        typer.Option(
            "--auto-truncate",
            help="Cut longer texts, unless a request says otherwise; else 413.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the engine: fp32, bf16, fp16 or int8; by default the model's.", rich_help_panel=_SPEED
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a batch, padding not counted.", rich_help_panel=_SPEED)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that compute; by default one for each core.", rich_help_panel=_SPEED)
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Serve on the Ray cluster of RAY_ADDRESS or of this machine, else on one that is started here.",
            rich_help_panel=_SCALE,
        ),
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="The most replicas on Ray, with --threads each (1); by default as many as there are cores for.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    packed: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep packed weights here and map them: several servers of a machine share their memory.",
            rich_help_panel=_SPEED,
        ),
    ] = None,
) -> None:
    """Serve models over HTTP: embeddings, labels, entities, answers, rankings.

    Speaks OpenAI's /v1/embeddings, the routes of text-embeddings-inference (/embed, /embed_all, /rerank, /predict,
    /similarity, /tokenize, /info, /health, /metrics), and pipelines' JSON at /tag and /qa. Requests are batched by
    real tokens, first come first served.
    """
    with plain_errors("no request was lost"):
        from distilbert_fast.jobs.settings import RecipeError

        try:
            from distilbert_fast.jobs.serve import serve as serve_here
            from distilbert_fast.serving.http.service import Limits
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "uvicorn", "orjson", "prometheus_client"):
                raise
            lacking = f"serve: {error.name} is not installed; pip install 'distilbert-fast[serve]'"
            raise RecipeError(lacking) from error

        sizes: dict[str, Any] = {
            "deadline": deadline,
            "queue_tokens": queue_tokens,
            "body_bytes": body_bytes,
            "inputs": inputs,
            "batch_tokens": batch_tokens,
        }
        run: Any = serve_here
        if ray:
            from distilbert_fast.jobs.serve_ray import serve_on_ray

            run = partial(serve_on_ray, replicas=replicas)
        elif replicas is not None:
            raise RecipeError("serve: replicas: expected with --ray, got without")
        run(
            model,
            task or (),
            host=host,
            port=port,
            precision=precision,
            max_length=max_length,
            key_file=api_key_file,
            packed=packed,
            threads=threads,
            limits=Limits(truncate=auto_truncate, **{name: size for name, size in sizes.items() if size is not None}),
            access_log=access_log,
        )

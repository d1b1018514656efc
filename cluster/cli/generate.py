"""``remuda generate``: stream the continuation of a prompt from a server to the terminal."""

import json
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import Annotated

import typer

from cluster.cli import options
from cluster.rpc.inference_client import GenerateOptions, Summary, TextDelta

EXAMPLES = 'Example: remuda generate "The herd came down" --max-tokens 40'


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input (without its last newline).")],
    target: options.Target = options.DEFAULT,
    model: options.Model = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
) -> None:
    """Continue a text with the model that a running server serves."""
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    wanted = GenerateOptions(model, max_tokens, temperature, top_p, seed)
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        print_stream(client.generate(text, wanted), as_json)


def print_stream(stream: Iterator[TextDelta | Summary], as_json: bool) -> str:
    """Print what comes as it comes (or one JSON object at the end), then one line of figures on stderr; returns the
    text."""
    started_s = time.perf_counter()
    first_s = 0.0
    text = ""
    token_ids: list[int] = []
    for event in stream:
        if isinstance(event, TextDelta):
            first_s = first_s or time.perf_counter() - started_s
            text += event.text
            token_ids += event.token_ids
            if not as_json:
                sys.stdout.write(_printable(event.text) if sys.stdout.isatty() else event.text)
                sys.stdout.flush()
        else:
            total_s = time.perf_counter() - started_s
            _print_end(event, text, token_ids, first_s, total_s, as_json)
    return text


def _printable(text: str) -> str:
    """Without what would steer the terminal: a model may say anything."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def _print_end(
    summary: Summary, text: str, token_ids: list[int], first_s: float, total_s: float, as_json: bool
) -> None:
    if as_json:
        figures = {
            "text": text,
            "token_ids": token_ids,
            "finish_reason": summary.finish_reason,
            "num_prompt_tokens": summary.num_prompt_tokens,
            "num_completion_tokens": summary.num_completion_tokens,
            "time_to_first_token_s": round(first_s, 4),
            "total_s": round(total_s, 4),
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    rate = summary.num_completion_tokens / total_s if total_s else 0.0
    sys.stderr.write(
        f"[{summary.num_completion_tokens} tokens, first after {first_s * 1e3:.0f} ms, {rate:.1f} tokens/s, "
        f"{summary.finish_reason}]\n"
    )

"""``remuda chat``: a conversation in the terminal, or one question and its answer."""

import sys
from typing import Annotated

import typer

from cluster.cli import options
from cluster.cli.generate import print_stream
from cluster.rpc.inference_client import GenerateOptions, InferenceClient
from engine.errors import ContextLengthExceeded

EXAMPLES = 'Example: remuda chat "My name is Zora. What is my name?"'


def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it a conversation begins.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
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
    """Talk to the model that a running server serves. An empty line or Ctrl-D ends the conversation."""
    wanted = GenerateOptions(model, max_tokens, temperature, top_p, seed)
    turns = [("system", system)] if system else []
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        if message is not None:
            print_stream(client.chat([*turns, ("user", message)], wanted), as_json)
            return
        while question := _ask():
            turns = _exchange(client, wanted, turns, question, as_json)


def _exchange(
    client: InferenceClient, wanted: GenerateOptions, turns: list[tuple[str, str]], question: str, as_json: bool
) -> list[tuple[str, str]]:
    """One question and its answer; returns the conversation so far. Ctrl-C ends the answer, not the conversation."""
    asked = [*turns, ("user", question)]
    try:
        return [*asked, ("assistant", print_stream(client.chat(asked, wanted), as_json))]
    except KeyboardInterrupt:
        sys.stderr.write("\n[stopped; this answer is forgotten]\n")
    except ContextLengthExceeded as error:
        sys.stderr.write(f"[{error}; a new conversation begins]\n")
        return [turn for turn in turns if turn[0] == "system"]
    return turns


def _ask() -> str:
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""

"""The ``remuda`` command."""

import os
import signal
import sys
from importlib.metadata import version

import typer

from cluster.cli import (
    adapters,
    bench,
    chat,
    doctor,
    drain,
    engine,
    frontend,
    generate,
    keys,
    plan,
    replay,
    serve,
    status,
    verify,
    worker,
)
from cluster.cli.deterministic_command import DeterministicCommand
from cluster.config import quiet_libraries
from cluster.errors import mapping_of
from engine.errors import RemudaError

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    name="remuda",
    help="Serve large and mixture-of-experts models from many devices on many hosts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="serve", epilog=serve.EXAMPLES, cls=DeterministicCommand)(serve.serve)
app.command(name="frontend", epilog=frontend.EXAMPLES)(frontend.frontend)
app.command(name="engine", epilog=engine.EXAMPLES, cls=DeterministicCommand)(engine.engine)
app.command(name="worker", epilog=worker.EXAMPLES)(worker.worker)
app.command(name="plan", epilog=plan.EXAMPLES, cls=DeterministicCommand)(plan.plan)
app.command(name="doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(name="generate", epilog=generate.EXAMPLES)(generate.generate)
app.command(name="chat", epilog=chat.EXAMPLES)(chat.chat)
app.command(name="status", epilog=status.EXAMPLES)(status.status)
app.command(name="replay", epilog=replay.EXAMPLES)(replay.replay)
app.command(name="drain", epilog=drain.EXAMPLES)(drain.drain)
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.command(name="bench", epilog=bench.EXAMPLES)(bench.bench)
app.command(name="verify", epilog=verify.EXAMPLES)(verify.verify)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"remuda {version('remuda')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point: an error of our tree becomes one line on stderr and the exit code of the error table."""
    quiet_libraries()
    try:
        app()
    except RemudaError as error:
        sys.stderr.write(f"remuda: {error}\n")
        sys.exit(mapping_of(error).exit_code)
    except KeyboardInterrupt:
        # gRPC's clean-up at a normal exit can hang when a second signal comes; nothing is left to clean up here.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""``remuda plan``: whether a model fits on given devices, to the byte, without its weights."""

import gc
from typing import Annotated

import typer

from cluster.cli import options
from cluster.cli.deterministic_command import determinism
from cluster.plan.layouts import Degrees
from engine.errors import InvalidOption

EXAMPLES = (
    "Examples: remuda plan config.json --gpus 16xH100-80 | remuda plan /models/Llama-4-Scout --gpus 2x4xA100-80 --tp 4 "
    "| remuda plan remuda-tiny --gpus 2xcpu-4 --json | remuda plan Llama-3.1-70B.json --gpus 2xNewGPU-100 "
    "--quantization int4 | remuda plan config.json --gpus 2x4xcpu-32 --tp 8 --link 5ms,1Gbit | "
    "remuda plan config.json --gpus 8xH100-80 --deterministic d2 | "
    "remuda plan config.json --gpus 16xH100-80 --format helm > values.yaml"
)


_TensorParallelSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "--tp", min=1, help="Fix it. [chosen]")
]
_PipelineParallelSize = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "--pp", min=1, help="Fix it. [chosen]")
]
_DataParallelSize = Annotated[
    int | None, typer.Option("--data-parallel-size", "--dp", min=1, help="Attention replicas. [chosen]")
]
_ExpertParallelSize = Annotated[
    int | None, typer.Option("--expert-parallel-size", "--ep", min=1, help="Fix it. [chosen]")
]
_Link = Annotated[
    str | None,
    typer.Option(
        help="Between two hosts, one way, as in 0.1ms,10Gbit: predicts what the layout loses to it, and weighs it."
    ),
]
_Deterministic = Annotated[
    str | None, typer.Option(metavar="[d1|d2]", help="Only what this mode of remuda serve allows. [off]")
]
_Format = Annotated[
    str, typer.Option("--format", help="text, or helm: values for the chart helm/remuda, where it fits.")
]
_EnableEplb = Annotated[bool, typer.Option("--enable-eplb", help="With room for experts on their way.")]
_NumRedundantExperts = Annotated[
    int, typer.Option(min=0, help="Copies of experts in each layer, over all ranks; with --enable-eplb.")
]


def plan(
    model: Annotated[
        str,
        typer.Argument(help="A directory, a config.json alone, a GGUF file, a hub id in the cache, or remuda-tiny."),
    ],
    gpus: Annotated[
        str | None,
        typer.Option(help="As in 16xH100-80, 2x8xH100-80 (hosts first), 4xAnyName-96, 8xcpu-32. [this machine]"),
    ] = None,
    tensor_parallel_size: _TensorParallelSize = None,
    pipeline_parallel_size: _PipelineParallelSize = None,
    data_parallel_size: _DataParallelSize = None,
    expert_parallel_size: _ExpertParallelSize = None,
    enable_eplb: _EnableEplb = False,
    num_redundant_experts: _NumRedundantExperts = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="int8, int4 or fp8, of a float checkpoint.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the longest request. [the most that fits]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests that run at once. [by device]")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in one step. [by device]")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of each GPU's memory.")] = 0.9,
    deterministic: _Deterministic = None,
    link: _Link = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model in the cache. [main]")] = None,
    answer_format: _Format = "text",
    as_json: options.Json = False,
) -> None:
    """Tell what each rank of a layout would hold, whether it fits, why not, and where it would. Reads no weights.

    Exit status 0, also where it does not fit: look at "fits" of --json; 2: the model or an option is wrong, or
    --format helm was asked of what does not fit.
    """
    _check_format(answer_format, as_json)
    # Shapes of large mixtures are many small objects that live to the end: collecting them would take half the time.
    gc.disable()
    # These need torch, which takes longer to import than the rest of the command.
    from cluster.cli.plan_text import print_answer
    from cluster.plan.helm_values import helm_values_text
    from cluster.plan.make_report import plan_model

    degrees = tensor_parallel_size, pipeline_parallel_size, data_parallel_size, expert_parallel_size
    report = plan_model(
        model,
        gpus,
        Degrees(*degrees, num_redundant_experts if enable_eplb else 0, enable_eplb, determinism(deterministic)),
        revision=revision,
        quantization=quantization,
        link=link,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        utilization=gpu_memory_utilization,
    )
    if answer_format == "helm":
        typer.echo(helm_values_text(report, quantization), nl=False)
    else:
        print_answer(report, as_json=as_json)


def _check_format(answer_format: str, as_json: bool) -> None:
    """Raises InvalidOption."""
    if answer_format not in ("text", "helm"):
        raise InvalidOption(f"--format {answer_format} is not known; use text or helm, or --json")
    if as_json and answer_format == "helm":
        raise InvalidOption("--format helm and --json exclude each other")

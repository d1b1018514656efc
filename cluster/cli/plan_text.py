"""``remuda plan`` for people: a table of bytes, then sentences. At most 100 columns."""

import json
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from cluster.plan.layout_plan import LayoutPlan
from cluster.plan.rank_memory import RankMemory
from cluster.plan.report import PlanReport, as_object, dispatch_reason, expert_dispatch, layout_text

WIDTH = 100
_MAX_COLUMNS = 4


def print_answer(report: PlanReport, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(as_object(report)) + "\n")
    else:
        print_plan(report, Console(width=WIDTH, highlight=False, markup=False))


def print_plan(report: PlanReport, console: Console) -> None:
    config, plan = report.model.shapes.config, report.plan
    form = config.quantization.name if config.quantization else report.options.dtype.value
    console.print(
        f"{report.model.name} ({config.architecture}), {form}: {report.counts.total:,} parameters, "
        f"{report.counts.active:,} active for a token of text"
    )
    console.print(_cache_line(report))
    console.print(report.model.licence.describe())
    for notice in report.model.licence.notices:
        console.print(f"  {notice}")
    used = f", {report.options.utilization:.0%} of it used" if plan.machines.device.is_gpu else ""
    console.print(
        f"\n{plan.machines} ({_gib(plan.machines.device.usable_bytes)} usable on each{used}): "
        f"{layout_text(plan.layout)}{_dispatch_text(report)}"
    )
    if (reason := dispatch_reason(plan)) is not None:
        console.print(reason)
    console.print(_table(plan))
    for line in _verdict(report):
        console.print(line)


def _dispatch_text(report: PlanReport) -> str:
    """How tokens come to their experts, where these are on several ranks."""
    form = expert_dispatch(report.model.shapes.config, report.plan.layout)
    is_divided = report.plan.layout.dp * report.plan.layout.tp > 1
    return f"; expert dispatch: {form}" if form is not None and is_divided else ""


def _cache_line(report: PlanReport) -> str:
    text = f"KV cache: {report.kv_token_bytes:,} bytes a token"
    if (windowed := report.windowed()) is not None:
        text += f", {windowed[1]:,} once {windowed[0]:,} more have come"
    return text


def _table(plan: LayoutPlan) -> Table:
    columns = _alike(plan.ranks)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bytes on")
    for members in columns[:_MAX_COLUMNS]:
        table.add_column(_title(members), justify="right")
    table.add_column("")
    shown = [members[0] for members in columns[:_MAX_COLUMNS]]
    for kind in dict.fromkeys(kind for rank in shown for kind in rank.weights):
        _row(table, f"  {kind}", [rank.weights.get(kind, 0) for rank in shown], "")
    _row(table, "weights", [rank.weight_bytes for rank in shown], "exact")
    _row(table, "KV blocks", [rank.num_blocks * rank.block_bytes for rank in shown], "what is left")
    _row(table, "activations", [rank.activations for rank in shown], "by formula")
    _row(table, "buffers", [rank.buffers for rank in shown], "by formula")
    for kind in shown[0].bounded:
        _row(table, kind.replace("_", " "), [rank.bounded[kind] for rank in shown], "bounded: at most")
    _row(table, "may use", [rank.budget for rank in shown], "")
    return table


def _row(table: Table, name: str, values: Sequence[int], remark: str) -> None:
    table.add_row(name, *(f"{value:,}" for value in values), remark)


def _alike(ranks: Sequence[RankMemory]) -> list[list[RankMemory]]:
    """Ranks with equal numbers together."""
    found: dict[tuple[object, ...], list[RankMemory]] = {}
    for rank in ranks:
        key = (tuple(rank.weights.items()), rank.num_blocks, rank.block_bytes, rank.buffers)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def _title(members: Sequence[RankMemory]) -> str:
    if len(members) == 1:
        return f"rank {members[0].rank}"
    if members[-1].rank - members[0].rank == len(members) - 1:
        return f"ranks {members[0].rank}–{members[-1].rank}"
    return f"{len(members)} ranks, first {members[0].rank}"


def _verdict(report: PlanReport) -> Iterator[str]:
    plan = report.plan
    if plan.fits:
        longest = report.model.shapes.config.max_context_len
        windowed = report.windowed()
        short = f" in requests of up to {windowed[0]:,}" if windowed else ""
        yield (
            f"fits: requests of up to {plan.max_model_len:,} of the model's {longest:,} tokens, "
            f"{plan.num_contexts:,} such at once; or {plan.kv_tokens:,} tokens in all{short}"
        )
    else:
        yield "does not fit:"
        for reason in plan.reasons[:_MAX_COLUMNS]:
            yield f"  {reason}"
        if report.nearest is None:
            yield "no layout on more machines of this kind was found either"
        else:
            yield f"nearest that fits: {_place(report.nearest)}"
        if report.quantized is not None:
            name, quantized = report.quantized
            yield f"with --quantization {name} it fits: {_place(quantized)}"
    for notice in report.notices():
        yield f"note: {notice}"


def _place(plan: LayoutPlan) -> str:
    return f"{plan.machines} with {layout_text(plan.layout)}, {plan.max_model_len:,} tokens a request"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

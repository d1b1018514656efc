"""What ``remuda plan --json`` says of every published config is what building it elsewhere counted."""

import pytest

from cluster.plan.devices import parse_machines
from cluster.plan.layouts import Degrees
from cluster.plan.make_report import make_report, plan_options
from cluster.plan.report import as_object
from tests.plan.models import DATA, PARAMS, found

ROOMY = parse_machines("8xRoomy-1024")


def test_all_published_configs_are_there() -> None:
    assert len(PARAMS) == 25
    assert {path.stem for path in DATA.glob("*.json")} - {"params"} == set(PARAMS)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_counts_to_the_byte(name: str) -> None:
    model, published = found(name), PARAMS[name]
    # Attention replicas would hold the dense weights again.
    answer = as_object(make_report(model, ROOMY, Degrees(dp=1), plan_options(model, ROOMY)))
    assert answer["parameters"] == published["total"]
    assert answer["active_parameters"] == published["active_text"]
    assert answer["vision_parameters"] == published["vision"]
    assert answer["kv_bytes_per_token"] == published["kv_bytes_per_token_bf16"]
    assert answer["fits"] is True and answer["reasons"] == []
    assert len(answer["ranks"]) == 8
    for rank in answer["ranks"]:
        assert sum(rank["weights"].values()) == rank["weight_bytes"]
        used = rank["weight_bytes"] + rank["kv_cache_bytes"] + rank["activation_bytes"] + rank["buffer_bytes"]
        assert used + sum(rank["bounded"].values()) <= rank["budget_bytes"]
    if answer["quantization"] is None and published["vision"] == 0:
        # Undivided, the weights are two bytes a parameter; what ranks hold together is that and what they repeat.
        together = sum(rank["weight_bytes"] for rank in answer["ranks"])
        assert 2 * published["total"] <= together < 2.2 * published["total"]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Llama-3.2-11B-Vision-Instruct", "32,768 bytes for each token of an image"),
        ("Llama-3.2-90B-Vision-Instruct", "81,920 bytes for each token of an image"),
    ],
)
def test_cross_attention_is_named(name: str, note: str) -> None:
    model = found(name)
    answer = as_object(make_report(model, ROOMY, Degrees(), plan_options(model, ROOMY)))
    assert any(note in notice for notice in answer["notices"])
    assert answer["served"] is False


@pytest.mark.parametrize(
    ("name", "span", "kept"), [("Llama-4-Scout-17B-16E-Instruct", 8192, 49152), ("Gemma-3-27B", 1024, 81920)]
)
def test_what_is_kept_past_the_window(name: str, span: int, kept: int) -> None:
    model = found(name)
    assert make_report(model, ROOMY, Degrees(), plan_options(model, ROOMY)).windowed() == (span, kept)

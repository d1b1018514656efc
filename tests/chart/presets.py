"""The chart's presets are answers of `remuda plan --format helm`."""

import gc
from typing import NamedTuple

from cluster.plan.helm_values import helm_values_text
from cluster.plan.layouts import Degrees
from cluster.plan.make_report import plan_model
from cluster.plan.report import PlanReport
from tests.plan.models import DATA


class Question(NamedTuple):
    """``config``: a file of tests/data/models, or the embedded model."""

    config: str
    gpus: str
    max_model_len: int | None = None


QUESTIONS = {
    "405b-bf16": Question("Llama-3.1-405B", "16xH100-80"),
    "405b-fp8": Question("Llama-3.1-405B-FP8", "8xH100-80"),
    # Llama 4 takes requests that would leave room for one or two; most want less.
    "maverick-fp8": Question("Llama-4-Maverick-17B-128E-Instruct-FP8", "8xH100-80", 131072),
    "70b": Question("Llama-3.3-70B-Instruct", "4xH100-80"),
    "scout": Question("Llama-4-Scout-17B-16E-Instruct", "4xH100-80", 131072),
    "cpu-demo": Question("remuda-tiny", "2xcpu-2"),
}


def report_of(question: Question) -> PlanReport:
    model = question.config if question.config == "remuda-tiny" else str(DATA / f"{question.config}.json")
    gc.disable()  # As in the command: shapes of large mixtures are many objects that live on.
    try:
        return plan_model(model, question.gpus, Degrees(), max_model_len=question.max_model_len)
    finally:
        gc.enable()


def preset_text(name: str) -> str:
    return helm_values_text(report_of(QUESTIONS[name]))

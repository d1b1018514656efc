"""Each quantized checkpoint is made once in a session."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from tests.quantization.checkpoints import Format, make_float_llama, make_float_mixtral, make_float_moe
from tests.quantization.comparison import Made, make, run_gang
from tests.support.model_driver import Generated

Quantized = Callable[[Format, str], Made]
Answers = Callable[[Mapping[str, Format], str, int, int], dict[str, list[Generated]]]
MAKERS = {"llama": make_float_llama, "moe": make_float_moe, "mixtral": make_float_mixtral}


@pytest.fixture(scope="session")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The unquantized checkpoint, "llama", "moe" or "mixtral"."""
    torch.set_num_threads(1)
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            directory = tmp_path_factory.mktemp(f"float-{kind}")
            MAKERS[kind](directory)
            made[kind] = directory
        return made[kind]

    return get


@pytest.fixture(scope="session")
def quantized(float_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A checkpoint in a format, "llama", "moe" or "mixtral"."""
    made: dict[tuple[str, str], Made] = {}

    def get(form: Format, kind: str) -> Made:
        key = form.name, kind
        if key not in made:
            made[key] = make(form, float_dir(kind), tmp_path_factory.mktemp("-".join(key)))
        return made[key]

    return get


@pytest.fixture(scope="session")
def answers(quantized: Quantized) -> Answers:
    """What a gang of tp and ep gives for each of the formats; one gang for all, as starting one takes its time."""
    given: dict[tuple[object, ...], dict[str, list[Generated]]] = {}

    def get(formats: Mapping[str, Format], kind: str, tp: int, ep: int) -> dict[str, list[Generated]]:
        key = (*formats, kind, tp, ep)
        if key not in given:
            directories = [quantized(form, kind).directory for form in formats.values()]
            given[key] = dict(zip(formats, run_gang(directories, tp, ep), strict=True))
        return given[key]

    return get

"""One request's tokens and logits, bit for bit, however it is computed (docs/determinism.md)."""

from pathlib import Path

import pytest
import torch

from engine.config import Determinism
from tests.determinism.models import MODELS, save_model
from tests.determinism.ways import ALONE, PAIR, WAYS, Setting, first_difference, observe_gang

FORMATS = (torch.float32, torch.bfloat16)
LAYOUTS = {
    "Llama 3": [(2, 1, 1), (4, 1, 1), (1, 1, 2), (2, 1, 2)],
    "Llama 4": [(2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1), (2, 2, 2)],
    "Mixtral": [(2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1), (2, 1, 2)],
    "Llama, dynamic rope": [(2, 1, 1)],
    "Llama 3, odd": [(2, 1, 1), (4, 1, 1)],
    "Mixtral, odd": [(2, 2, 1), (4, 1, 1), (4, 2, 1)],
}
"""(tp, ep, pp) beside one rank."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def setting(checkpoints: Path, name: str, dtype: torch.dtype, determinism: Determinism, **others: object) -> Setting:
    return Setting(str(save_model(name, checkpoints, dtype)), determinism, **others)  # type: ignore[arg-type]


def test_without_the_mode_the_ways_differ(checkpoints: Path) -> None:
    """Else the comparisons below would show nothing."""
    found = observe_gang(setting(checkpoints, "Llama 3", torch.float32, Determinism.OFF, prompt_length=90), PAIR)
    assert first_difference(found, found[ALONE][-1]) is not None


@pytest.mark.parametrize(
    ("name", "dtype", "native"),
    [
        ("Llama 3", torch.bfloat16, True),
        ("Llama 3", torch.float32, False),
        ("Llama, dynamic rope", torch.float32, False),
        ("Llama 4", torch.bfloat16, True),
        ("Mixtral", torch.bfloat16, False),
        ("Mixtral, odd", torch.bfloat16, True),
    ],
)
def test_d1_hides_batch_chunks_and_restarts(checkpoints: Path, name: str, dtype: torch.dtype, native: bool) -> None:
    wanted = setting(checkpoints, name, dtype, Determinism.D1, native=native, prompt_length=90)
    found = observe_gang(wanted, PAIR)
    assert first_difference(found, found[ALONE][-1]) is None


@pytest.mark.parametrize("name", ["Llama 3", "Mixtral", "Llama 4"])
def test_d1_hides_them_in_steps_of_more_tokens_than_native_layers_take(checkpoints: Path, name: str) -> None:
    wanted = setting(checkpoints, name, torch.bfloat16, Determinism.D1, prompt_length=620)
    found = observe_gang(wanted, PAIR)
    assert first_difference(found, found[ALONE][-1]) is None


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [("Llama 4", torch.float32, (2, 1)), ("Mixtral", torch.bfloat16, (2, 2))],
)
def test_d2_hides_the_layout(checkpoints: Path, name: str, dtype: torch.dtype, layout: tuple[int, int]) -> None:
    wanted = setting(checkpoints, name, dtype, Determinism.D2, prompt_length=90)
    expected = observe_gang(wanted, (ALONE,))[ALONE][-1]
    tp, ep = layout
    divided = setting(checkpoints, name, dtype, Determinism.D2, prompt_length=90, tp=tp, ep=ep)
    assert first_difference(observe_gang(divided, PAIR[1:]), expected) is None


@pytest.mark.full
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_d1_in_all_ways(checkpoints: Path, name: str, dtype: torch.dtype, native: bool) -> None:
    for tp in (1, 2):
        found = observe_gang(setting(checkpoints, name, dtype, Determinism.D1, native=native, tp=tp), WAYS)
        assert first_difference(found, found[ALONE][-1]) is None


@pytest.mark.full
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ["Llama 4", "Mixtral", "Mixtral, odd"])
@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 2)])
def test_d1_beside_another_attention_replica(
    checkpoints: Path, name: str, dtype: torch.dtype, tp: int, ep: int
) -> None:
    """Whose tokens, always others, meet this one's at the experts."""
    found = observe_gang(setting(checkpoints, name, dtype, Determinism.D1, tp=tp, ep=ep, dp=2), PAIR)
    assert first_difference(found, found[ALONE][-1]) is None


@pytest.mark.full
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_d2_in_all_layouts(checkpoints: Path, name: str, dtype: torch.dtype, native: bool) -> None:
    found = observe_gang(setting(checkpoints, name, dtype, Determinism.D2, native=native), PAIR)
    expected = found[ALONE][-1]
    assert first_difference(found, expected) is None
    for tp, ep, pp in LAYOUTS[name]:
        divided = setting(checkpoints, name, dtype, Determinism.D2, native=native, tp=tp, ep=ep, pp=pp)
        assert first_difference(observe_gang(divided, PAIR), expected) is None, (tp, ep, pp)


@pytest.mark.full
@pytest.mark.parametrize("quantization", ["int4", "fp8"])
@pytest.mark.parametrize("name", ["Llama 3", "Mixtral"])
def test_weights_alone_may_be_quantized(checkpoints: Path, name: str, quantization: str) -> None:
    """While loading, each canonical shard by itself."""
    one = setting(checkpoints, name, torch.bfloat16, Determinism.D2, quantization=quantization)
    found = observe_gang(one, PAIR)
    expected = found[ALONE][-1]
    assert first_difference(found, expected) is None
    divided = setting(checkpoints, name, torch.bfloat16, Determinism.D2, quantization=quantization, tp=2)
    assert first_difference(observe_gang(divided, PAIR), expected) is None

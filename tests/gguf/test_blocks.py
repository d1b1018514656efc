"""Blocks decoded bit by bit as the gguf package decodes them; matrices that a rank holds a part of."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from engine.errors import LayoutError
from engine.gguf.block_types import QUANTIZED_TYPES
from engine.parallel.mesh import Mesh
from engine.parameter import ParameterBuilder, Split
from engine.quantization.gguf import GgufMatrix
from engine.quantization.gguf_blocks import dequantize, scales_are_finite
from engine.quantization.matrix import MatrixPart
from engine.quantization_config import MatrixFormat, WeightFormat
from tests.gguf.files import random_blocks

KINDS = sorted(QUANTIZED_TYPES)


def expected_values(blocks: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    return np.asarray(gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]))


def make_matrix(kind: str, blocks: np.ndarray[Any, Any], **splits: Split) -> GgufMatrix:
    """Of a matrix [rows, inputs] the part that a rank holds, filled as the loader would."""
    type_ = QUANTIZED_TYPES[kind]
    build = ParameterBuilder(Mesh(), torch.float32, torch.device("cpu"), "layer.")
    inputs = blocks.shape[1] // type_.block_bytes * type_.block_elements
    part = MatrixPart("down_proj", blocks.shape[0], inputs, **splits)
    matrix = GgufMatrix(build, [part], MatrixFormat(WeightFormat.GGUF, gguf_type=kind))
    for piece in build.slices:
        window = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.destination.shape, strict=True))
        assert piece.name == "layer.down_proj.weight" and piece.shape == blocks.shape
        piece.destination.copy_(torch.from_numpy(blocks)[window])
    return matrix


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_the_oracles(kind: str) -> None:
    """Random bytes reach every code and every packed scale; some scales are zero, negative or subnormal."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(KINDS.index(kind))
    blocks = random_blocks(kind, (1, 256 * 4000), generator).reshape(-1, QUANTIZED_TYPES[kind].block_bytes)
    offset = QUANTIZED_TYPES[kind].scale_offsets[0]
    special = np.array([0.0, -0.0, -3.5, 6e-8, 65504.0], np.float16)
    blocks[: len(special), offset : offset + 2] = special[:, None].view(np.uint8)
    ours = dequantize(torch.from_numpy(blocks), kind).numpy()
    theirs = expected_values(blocks, kind)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_what_the_package_encodes_is_decoded(kind: str) -> None:
    values = np.random.default_rng(5).normal(size=(8, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(values, GGMLQuantizationType[kind])
    matrix = make_matrix(kind, blocks)
    np.testing.assert_array_equal(matrix.rows(slice(None)).numpy(), expected_values(blocks, kind))
    assert np.abs(matrix.rows(slice(None)).numpy() - values).max() < (0.02 if kind == "Q8_0" else 0.4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_rows_slices_and_products(kind: str) -> None:
    torch.set_num_threads(1)
    generator = np.random.default_rng(3)
    blocks = random_blocks(kind, (12, 1024), generator)
    whole = torch.from_numpy(expected_values(blocks, kind))
    matrix = make_matrix(kind, blocks)
    index = torch.tensor([7, 0, 7, 11])
    torch.testing.assert_close(matrix.rows(index), whole[index], rtol=0, atol=0)
    torch.testing.assert_close(matrix.rows(slice(3, 5)), whole[3:5], rtol=0, atol=0)
    assert matrix.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 1024)
    hidden = torch.from_numpy(generator.normal(size=(5, 1024)).astype(np.float32))
    torch.testing.assert_close(matrix.forward(hidden), hidden @ whole.t(), rtol=1e-5, atol=1e-4)
    for index_ in (0, 1):
        column = make_matrix(kind, blocks, outputs=Split(2, index_))
        torch.testing.assert_close(column.rows(slice(None)), whole.chunk(2)[index_], rtol=0, atol=0)
        row = make_matrix(kind, blocks, inputs=Split(2, index_))
        torch.testing.assert_close(row.rows(slice(None)), whole.chunk(2, dim=1)[index_], rtol=0, atol=0)
        assert row.weight.shape[1] == blocks.shape[1] // 2


def test_a_cut_through_a_block_is_refused() -> None:
    blocks = random_blocks("Q6_K", (4, 768), np.random.default_rng(4))
    with pytest.raises(LayoutError, match=r"layer\.down_proj is in Q6_K.*256.*768.*2 ranks"):
        make_matrix("Q6_K", blocks, inputs=Split(2, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_no_number_is_seen(kind: str) -> None:
    blocks = random_blocks(kind, (4, 512), np.random.default_rng(6))
    assert scales_are_finite(torch.from_numpy(blocks), kind)
    for offset in QUANTIZED_TYPES[kind].scale_offsets:
        for bad in (np.nan, np.inf):
            changed = blocks.copy()
            at = QUANTIZED_TYPES[kind].block_bytes + offset
            changed[2, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
            assert not scales_are_finite(torch.from_numpy(changed), kind)

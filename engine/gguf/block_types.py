"""The number formats of GGUF tensors. Torch-free.

A row of a quantized tensor is a sequence of blocks, each a few scales and codes of ``block_elements`` weights
(ggml's block layouts; engine.quantization.gguf_blocks decodes them).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One format. ``block_elements``: weights in a block. ``block_bytes``: its length. ``scale_offsets``: where in a
    block its float16 scales are; empty for plain floats, which are blocks of one."""

    name: str
    block_elements: int
    block_bytes: int
    scale_offsets: tuple[int, ...] = ()

    @property
    def is_quantized(self) -> bool:
        return bool(self.scale_offsets)

    def num_bytes(self, num_elements: int) -> int:
        """Of so many weights, which must be whole blocks."""
        assert num_elements % self.block_elements == 0
        return num_elements // self.block_elements * self.block_bytes


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, (0,)),
    8: BlockType("Q8_0", 32, 34, (0,)),
    12: BlockType("Q4_K", 256, 144, (0, 2)),
    13: BlockType("Q5_K", 256, 176, (0, 2)),
    14: BlockType("Q6_K", 256, 210, (208,)),
    30: BlockType("BF16", 1, 2),
}
"""What is served, by its number in the file."""

QUANTIZED_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.is_quantized}
"""By name."""

_OTHER_NAMES = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


def type_name(number: int) -> str:
    """For messages: the name of any format, served or not."""
    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number].name
    return _OTHER_NAMES.get(number, f"number {number}")

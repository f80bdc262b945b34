"""NF4 (QLoRA, arXiv 2305.14314): block sizes, and the check that a matrix can be packed and sharded.

NF4 has one scale per 64 weights, and quantises the scales in blocks too. FSDP shards a packed matrix by rows, and each
shard needs whole blocks.
"""

from torch import nn

from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError

BLOCK, SCALES = 64, 256  # torchao's defaults
MOST_SHARDS = 8  # up to this many processes, the blocks and so the packed weights are the same


def scales_per_block(rows: int, columns: int) -> int:
    """The number of scales packed together: 256, or less if the matrix, or an eighth of it, has no whole blocks."""
    for shards in (MOST_SHARDS, 4, 2, 1):
        if rows % shards == 0 and (blocks := rows * columns // shards) % BLOCK == 0:
            blocks //= BLOCK
            return min(SCALES, blocks & -blocks)  # the largest power of two that divides `blocks`
    return SCALES


def packs_weights(model: Component) -> bool:
    """Whether a model section asks for QLoRA."""
    builder = model.builder
    lora = builder.get("lora") or {}
    return bool(lora.get("quantize_base") or builder.get("quantize_base", "qlora" in builder.path))


def check_nf4(model: nn.Module, shards: int, any_size: bool) -> None:
    """Check that each matrix of the unpacked `model` can be packed, and sharded over `shards` processes, in blocks of
    torchao's size or, for `any_size`, of `scales_per_block`."""
    for name, matrix in model.layers.named_parameters():
        if matrix.dim() != 2 or ".lora_" in name:
            continue
        rows, columns = matrix.shape
        block = BLOCK * (scales_per_block(rows, columns) if any_size else SCALES)
        if rows % shards or rows * columns % (block * shards):
            processes = f" over {shards} processes" if shards > 1 else ""
            raise ConfigError(
                f"model: layers.{name} [{rows}, {columns}] cannot be packed in NF4{processes}, which needs rows in "
                f"multiples of {shards}, and weights in multiples of {block * shards}. Allowed: hf_decoder (hf/qlora), "
                f"whose blocks fit most sizes; {'fewer processes; ' if shards > 1 else ''}quantize_base=false"
            )

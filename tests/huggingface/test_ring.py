"""Models of transformers with `attn_implementation="ring"`: parts of sequences give what one process gives."""

import pytest
from architectures import largest_differences, split_step, whole_step

KINDS = ("plain", "packed", "padded")
EXACT = 1e-12


def compare(pool, name, kind, world, placement, exchange, tolerance=EXACT, **options):
    whole = whole_step(name, kind, **options)
    parts = pool.run(world, split_step, name, kind, placement, exchange, None, *options.values())
    differences = largest_differences(whole, parts, kind)
    worst = max(differences, key=differences.get)
    assert differences[worst] < tolerance, f"{worst}: {differences[worst]:.1e}"


@pytest.mark.parametrize(
    ("name", "kind", "world", "placement", "exchange"),
    [
        ("Llama", "packed", 2, "zigzag", "gather"),
        ("Mistral", "padded", 2, "contiguous", "ring"),
        ("Qwen3", "plain", 2, "zigzag", "swap"),
        ("Gemma 2", "padded", 2, "zigzag", "gather"),
        ("gpt-oss", "packed", 2, "contiguous", "ring"),
        ("DeepSeek-V3", "plain", 2, "contiguous", "swap"),
        ("Llama 4", "packed", 2, "contiguous", "gather"),
    ],
)
def test_parts_give_what_one_process_gives(pool, name, kind, world, placement, exchange):
    compare(pool, name, kind, world, placement, exchange)

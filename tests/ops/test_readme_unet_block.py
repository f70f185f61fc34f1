"""The decoder block that README.md shows is one that works."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_decoder_block_of_the_readme(memory_format):
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
        if "class DecoderBlock" in block
    )
    namespace = {}
    exec(compile(code, README.name, "exec"), namespace)
    torch.manual_seed(0)
    block = namespace["DecoderBlock"](48, 16, 8)
    x, skip = (torch.randn(2, n, 5, 4).contiguous(memory_format=memory_format) for n in (48, 16))
    kappa = torch.rand(2, 16)
    concat = torch.cat([x, kappa[:, :, None, None] * skip], dim=1)
    normed = F.silu(F.group_norm(concat, 32, block.norm.weight, block.norm.bias))
    expected = block.conv(normed) + block.shortcut(concat)
    torch.testing.assert_close(block(x, skip, kappa), expected, rtol=1e-4, atol=1e-5)

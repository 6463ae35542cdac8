"""The kernel that expands 4-bit weights, in Triton's interpreter, against bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

COMPARE = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from qlora_harness.fused.expand import expand_with_kernel

for kind in ("nf4", "fp4"):
    for nested in (False, True):
        for shape in ((128, 192), (64, 64 * 300)):
            torch.manual_seed(0)
            weight = torch.randn(shape) * torch.rand(shape[0], 1)
            packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            state.dtype = torch.float32  # the interpreter truncates to bfloat16: see test_gpu.py
            found = expand_with_kernel(packed, state, torch.float32)
            assert torch.equal(found, dequantize_4bit(packed, state)), (kind, nested, shape)
print("equal")
"""


def test_kernel_gives_the_values_of_bitsandbytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"

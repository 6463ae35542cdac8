"""The Triton kernels of fused layers and packs, in Triton's interpreter, against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

# Triton's loops then convert one-element arrays to numbers, which NumPy no longer allows.
BROKEN = Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4")

LOAD = """
from types import SimpleNamespace
import torch
from bitsandbytes.functional import quantize_4bit
from qlora_harness.fused.bordered import Bordered, Projection, Scratch
from qlora_harness.fused.triton_weights import Loader

def layer(height, width, kind, nested):
    weight = torch.nn.Parameter(torch.randn(height, width) * torch.rand(height, 1), False)
    if kind is not None:
        packed, state = quantize_4bit(weight.data, quant_type=kind, compress_statistics=nested)
        weight = torch.nn.Parameter(packed, requires_grad=False)
        weight.quant_state = state
    return SimpleNamespace(weight=weight, in_features=width, out_features=height)

def projection(height, width, rank, kind, nested, adapted):
    down, up = (torch.nn.Parameter(torch.randn(s)) for s in ((rank, width), (height, rank)))
    base = layer(height, width, kind, nested)
    return Projection(base, down if adapted else None, up if adapted else None, 0.3, 0.0)

torch.manual_seed(0)
for kind, nested in (("nf4", True), ("nf4", False), ("fp4", True), (None, False)):
    for width in (64, 2304):
        for adapted in ((True,), (True, True), (True, False, True), (False, False)):
            heights = (48, 16, 32)[: len(adapted)]
            group = Bordered(
                [
                    projection(h, width, 3, kind, nested, a)
                    for h, a in zip(heights, adapted, strict=True)
                ],
                Scratch(),
            )
            states = [getattr(p.layer.weight, "quant_state", None) for p in group.projections]
            expected = group.load(torch.empty(0)).whole.clone()
            matrix = group.loaded(torch.empty(0)).whole
            matrix[: group.height, width:] = float("nan")
            matrix[group.height :] = float("nan")
            if kind is not None:
                matrix[: group.height, :width] = float("nan")
            loader = Loader(group, states)
            assert loader.fits
            loader(matrix)
            rows, columns = group.height, width + group.border
            a, b = matrix[:rows, :columns], expected[:rows, :columns]
            assert torch.equal(a, b), (kind, nested, width, adapted)
            assert torch.allclose(matrix[rows:, :width], expected[rows:, :width], rtol=1e-6)
print("equal")
"""

ELEMENTWISE = """
import torch
from qlora_harness.fused import ops, triton_ops
from qlora_harness.fused.packed_row import Rotation

torch.manual_seed(0)
def room(rows, columns):
    return torch.full((rows, columns + 7), float("nan"))[:, :columns]
def near(a, b):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), (a - b).abs().max()

for columns in (8, 96, 300):
    x, add, dy = (torch.randn(5, columns) for _ in range(3))
    weight = torch.randn(columns)
    for other in (None, add):
        a, b = room(5, columns), room(5, columns)
        total = triton_ops.rms_norm(x, weight, 1e-5, a, other)
        near(total, ops.rms_norm(x, weight, 1e-5, b, other))
        near(a, b)
        a, b = room(5, columns), room(5, columns)
        first, second = room(5, columns).copy_(dy), dy.clone()
        more = None if other is None else room(5, columns).copy_(other)
        triton_ops.rms_norm_backward(first, x, weight, 1e-5, a, more)
        ops.rms_norm_backward(second, x, weight, 1e-5, b, more)
        near(a, b)
        near(first, second)

for columns in (5, 192):
    source, out = torch.randn(70, columns), room(70, columns)
    triton_ops.copy(source, out)
    assert torch.equal(out, source)

for columns in (8, 1500):
    gates, dy = torch.randn(4, 2 * columns), torch.randn(4, columns)
    a, b = room(4, columns), torch.empty(4, columns)
    triton_ops.swiglu(gates, a)
    ops.swiglu(gates, b)
    near(a, b)
    first, second = gates.clone(), gates.clone()
    a, b = room(4, columns).copy_(dy), dy.clone()
    triton_ops.swiglu_backward(first, a)
    ops.swiglu_backward(second, b)
    near(first, second)
    near(a, b)

for heads, keys, size in ((4, 4, 8), (6, 2, 12), (3, 1, 2)):
    angles = torch.randn(5, size // 2).repeat(1, 2)
    row = Rotation(angles.cos(), angles.sin())
    first = torch.randn(5, (heads + 2 * keys) * size)
    second = first.clone()
    triton_ops.rotate(first, heads + keys, row.cos, row.sin)
    ops.rotate(second, heads + keys, row)
    near(first, second)
print("equal")
"""

ATTENTION = """
from itertools import accumulate
import torch
from qlora_harness.fused import attention, ops, triton_attention
from qlora_harness.fused.packed_row import PackedRow
from qlora_harness.fused.triton_attention import AttentionTiling

torch.manual_seed(0)
for lengths, heads, keys, size, tiling in (
    ((1, 5, 64, 65, 130), 2, 1, 16, None),
    ((130, 3), 1, 1, 64, None),
    ((70, 1), 3, 1, 16, AttentionTiling(64, 32, 4, 1)),
    ((33, 70), 2, 2, 16, AttentionTiling(32, 64, 4, 1)),
):
    if tiling is not None:
        triton_attention.FORWARD = tiling
        triton_attention.QUERY_GRADIENT = tiling
        triton_attention.KEY_GRADIENT = tiling
    starts = tuple(accumulate(lengths, initial=0))
    tokens = starts[-1]
    angles = torch.randn(tokens, size // 2).repeat(1, 2)
    row = PackedRow(angles.cos(), angles.sin(), torch.tensor(starts), starts, max(lengths))
    plain = torch.randn(tokens, (heads + 2 * keys) * size, requires_grad=True)
    turned = plain.clone()
    ops.rotate(turned, heads + keys, row)
    expected, _ = attention.forward(turned, heads, keys, row, 0.3)
    gradient = torch.randn(tokens, heads * size + 3)[:, :-3].unflatten(1, (heads, size))
    (expected_back,) = torch.autograd.grad(expected, plain, gradient)
    out, lse = triton_attention.forward(turned.detach(), heads, keys, row, 0.3)
    assert torch.allclose(out, expected, atol=1e-4), lengths
    for back in (
        triton_attention.backward(gradient, turned.detach(), out, lse, row, 0.3),
        attention.backward(gradient, turned.detach(), expected.detach(), None, row, 0.3),
    ):
        assert torch.allclose(back, expected_back, atol=1e-4), lengths
print("equal")
"""

CROSS_ENTROPY = """
import torch
from torch.nn.functional import cross_entropy
from qlora_harness.fused import launch, triton_ops
import qlora_harness.fused.cross_entropy as head

torch.manual_seed(0)
for vocabulary in (5, 96, 9000):
    logits = (10 * torch.randn(7, vocabulary)).requires_grad_()
    targets = torch.tensor([0, vocabulary - 1, 1, 2, 3, 2, 0])
    expected = cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    turned, losses = logits.detach().clone(), torch.full((7,), float("nan"))
    triton_ops.cross_entropy(turned, targets, losses)
    assert torch.allclose(losses, expected, rtol=1e-5, atol=1e-6), vocabulary
    assert torch.allclose(turned, gradient, rtol=1e-4, atol=1e-6), vocabulary

logits = 10 * torch.randn(7, 300)
half = logits.bfloat16()
expected = half.float().softmax(dim=1)
expected[torch.arange(7), torch.tensor([0, 299, 1, 2, 3, 2, 0])] -= 1
triton_ops.cross_entropy(half, torch.tensor([0, 299, 1, 2, 3, 2, 0]), torch.empty(7))
assert torch.allclose(half.float(), expected, rtol=2**-7, atol=1e-6)

hidden = torch.randn(200, 16, requires_grad=True)
weight, targets = torch.randn(64, 16), torch.randint(64, (200,))
expected = head.summed_cross_entropy(hidden, weight, targets)
(gradient,) = torch.autograd.grad(expected / 3, hidden)
launch.usable = lambda x: True
for head._LOGITS in (1, 2 * 64 * 64, 2**25):  # 64 rows at a time, 128, all
    total = head.summed_cross_entropy(hidden, weight, targets)
    (other,) = torch.autograd.grad(total / 3, hidden)
    assert torch.allclose(total, expected, rtol=1e-5), head._LOGITS
    assert torch.allclose(other, gradient, rtol=1e-4, atol=1e-6), head._LOGITS
print("equal")
"""


DROPOUT = """
import numpy as np
import torch
from qlora_harness.fused import dropout, triton_dropout
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.triton_dropout import DropoutTiling

def philox(seed, c0, c1):
    # Salmon et al. 2011: 10 rounds of Philox-4x32.
    c = [np.uint64(c0), np.uint64(c1), np.uint64(0), np.uint64(0)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        high = np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k[0]), b & low,
             (a >> high) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [int(word) for word in c]

# The first known answer of the authors' Random123.
assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

def unpack(bits, columns):
    groups = bits.unflatten(2, (-1, 1, 64))
    ones = (groups >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    return ones.flatten(2)[..., :columns].bool()

def room(rows, columns):
    return torch.full((rows, columns + 5), float("nan"))[:, :columns]

cpu = torch.device("cpu")
torch.manual_seed(0)
for shapes, probability, seed in (
    ([(1, 3, 8)], 0.5, 0), ([(2, 5, 520), (0, 5, 8), (3, 7, 24)], 0.1, 2**61 + 12345)
):
    drawn = triton_dropout.draw(shapes, probability, torch.tensor([seed]), cpu)
    assert [m.shape for m in drawn] == [(n, rows, -(-k // 512) * 64) for n, rows, k in shapes]
    masks = [mask.flatten() for group in drawn for mask in group]
    assert masks[0].dtype == torch.uint8
    for adapter, mask in enumerate(masks):
        for byte in (0, 1, 180, 191, len(mask) - 1):
            words = philox(seed, byte, adapter)
            parts = [part for word in words for part in (word & 0xFFFF, word >> 16)]
            expected = sum((n >= round(probability * 2**16)) << j for j, n in enumerate(parts))
            assert int(mask[byte]) == expected
seed = torch.tensor([3])
(many,) = triton_dropout.draw([(2, 64, 1024)], 0.1, seed, cpu)
longer = triton_dropout.draw([(2, 70, 1024)], 0.1, seed, cpu)[0]
assert torch.equal(longer[:, :64], many)
many = unpack(many, 1024)
assert abs(many.float().mean() - 0.9) < 0.003
assert abs((many[0] != many[1]).float().mean() - 0.18) < 0.005

triton_dropout._LEAST = 1  # several shares
for rows, columns, adapters, rank, tiling in (
    (1, 16, 1, 4, None),
    (70, 200, 3, 5, None),
    (130, 72, 2, 16, DropoutTiling(16, 4, 1)),
    (20, 1100, 2, 4, None),
):
    if tiling is not None:
        triton_dropout.PRODUCT = triton_dropout.ADD = triton_dropout.GRADIENT = (tiling,)
        triton_dropout._first_tilings.cache_clear()
    (bits,) = triton_dropout.draw([(adapters, rows, columns)], 0.2, torch.tensor([11]), cpu)
    packed, plain = Masks(bits, 1.25), Masks(unpack(bits, columns), 1.25)
    x = room(rows, columns).copy_(torch.randn(rows, columns))
    down = room(adapters * rank, columns).copy_(torch.randn(adapters * rank, columns))
    d_inner = room(rows, adapters * rank).copy_(torch.randn(rows, adapters * rank))
    beside = room(rows, adapters * rank)
    inner = dropout.products(x, down, packed, beside)
    torch.testing.assert_close(inner, dropout.products(x, down, plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(inner, beside) and beside._base[:, -5:].isnan().all()
    assert torch.equal(dropout.products(x, down, packed), inner)
    first, second = (room(rows, columns).copy_(x) for _ in range(2))
    dropout.add_products(first, d_inner, down, packed)
    dropout.add_products(second, d_inner, down, plain)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    first, second = (
        dropout.gradients(d_inner, x, masks, 0.3, torch.float32) for masks in (packed, plain)
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
print("equal")
"""

TREE = """
import numpy as np
import torch
from qlora_harness.fused.triton_attention import AttentionTiling
from qlora_harness.score import triton_tree
from qlora_harness.score.prefix_tree import Query, plan
from qlora_harness.score.tree_attention import TreeAttention, tree_blocks

torch.manual_seed(0)
tilings = [triton_tree.tiling(torch.float32, 16, False)]
tilings += [AttentionTiling(128, 64, 4, 1), AttentionTiling(64, 128, 4, 1)]
triton_tree.tiling = lambda *which: tilings[-1]
prefix = list(range(150))
texts = [[*prefix, 1, n, *range(90)] for n in range(2)] + [[*prefix[:140], 2], [3] * 20]
(pack,) = plan([Query(text, [0]) for text in texts], pack_tokens=10**6, window=10**6)
size = len(pack.end)
padded = -(-size // 128) * 128
end = np.concatenate([pack.end, np.arange(size + 1, padded + 1, dtype=np.int32)])
blocks = tree_blocks(end, torch.device("cpu"))
assert blocks.seen.tolist() == [[0, 1, 0, 1, 2], [1, 2, 0, 1, 2], [0, 3, 0, 1, 2]]
while tilings:
    for heads, keys, width in ((2, 1, 16), (2, 2, 24)):
        row = torch.randn(padded, (heads + 2 * keys) * width).unflatten(1, (-1, width))
        q, k, v = row.split([heads, keys, keys], dim=1)
        out = TreeAttention((), blocks)(q, k, v, 0.3)
        expected = TreeAttention(pack.segments, None)(*(x[:size] for x in (q, k, v)), 0.3)
        assert torch.allclose(out[:size], expected, atol=1e-5), (heads, keys, width)
        assert torch.allclose(out[size:], v[size:].repeat_interleave(heads // keys, dim=1))
        apart = k.contiguous(), v.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(TreeAttention((), blocks)(q, *apart, 0.3), out)
    tilings.pop()
print("equal")
"""


@pytest.mark.parametrize(
    "script",
    [LOAD, ELEMENTWISE, ATTENTION, CROSS_ENTROPY, DROPOUT, TREE],
    ids=["load", "elementwise", "attention", "cross_entropy", "dropout", "tree"],
)
@pytest.mark.skipif(BROKEN, reason="the interpreter of Triton 3.6 fails with NumPy 2.4 and later")
def test_kernels_agree_with_plain_torch(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


SHARED_MEMORY = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_harness.fused import triton_dropout

KERNELS = {
    "product": ("x x_stride down down_stride bits parts rows columns bytes_in_row share rank "
                "factor"),
    "add": ("gradient gradient_stride inner inner_stride down down_stride bits rows columns "
            "bytes_in_row rank factor"),
    "gradient": ("inner inner_stride x x_stride bits parts rows columns bytes_in_row share rank "
                 "factor"),
}

def shared(name, tiling, rank, dtype, capability):
    kernel = getattr(triton_dropout, f"{name}_kernel")
    kinds = {"bits": "*u8", "parts": "*fp32", "factor": "fp32"}
    kinds |= dict.fromkeys(("x", "down", "inner", "gradient"), f"*{dtype}")
    types = {a: kinds.get(a, "i32") for a in KERNELS[name].split()}
    fixed = {"ROWS": tiling.rows, "RANK": rank, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    fixed |= {"ADAPTERS": 3} if name == "add" else {}
    names = kernel.arg_names
    assert set(names) == types.keys() | fixed.keys()
    changing = ("factor", "rows", "share")
    wide = [a for a in types if a not in changing]
    source = ASTSource(
        kernel,
        {a: types.get(a, "constexpr") for a in names},
        {(names.index(a),): value for a, value in fixed.items()},
        {(names.index(a),): [["tt.divisibility", 16]] for a in wide},
    )
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options=options).metadata.shared

# Shared memory of an H100, an A100, and an RTX 30 or 40.
for capability, room, rank, dtype, numbers in (
    (90, 232448, 64, "bf16", (0, 0, 0)),
    (90, 232448, 256, "bf16", (0, 0, 1)),
    (90, 232448, 128, "fp32", (0, 0, 1)),
    (80, 166912, 64, "bf16", (0, 0, 0)),
    (86, 101376, 64, "bf16", (0, 0, 1)),
    (86, 101376, 256, "fp32", (3, 1, 3)),
):
    size = 4 if dtype == "fp32" else 2
    for name, number in zip(KERNELS, numbers):
        tilings = getattr(triton_dropout, name.upper())
        predicted = [getattr(triton_dropout, f"_{name}_bytes")(t, rank, size) for t in tilings]
        chosen = next(i for i, n in enumerate(predicted) if n <= room)
        taken = shared(name, tilings[chosen], rank, dtype, capability)
        print(capability, rank, dtype, name, chosen, predicted[chosen], taken)
        assert taken <= predicted[chosen] and chosen == number
"""


TREE_SHARED_MEMORY = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qlora_harness.score.triton_tree import tiling, tree_kernel as kernel

names = kernel.arg_names
for capability, room in ((90, 232448), (80, 166912), (86, 101376)):
    for kind, columns in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64)):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        tiles = tiling(dtype, columns, capability != 86)
        types = dict.fromkeys(names[:12], "i32") | dict.fromkeys(names[3:5], "*i32")
        types |= dict.fromkeys((*names[:3], "out"), f"*{kind}") | {"factor": "fp32"}
        fixed = {"GROUP": 1, "SIZE": columns, "COLUMNS": columns, "M": tiles.queries}
        fixed |= {"N": tiles.keys, "BLOCK": 128, "PRECISION": "ieee" if kind == "fp32" else "tf32"}
        assert set(names) == types.keys() | fixed.keys()
        whole = [a for a in types if a not in ("blocks", "factor")]
        source = ASTSource(
            kernel,
            {a: types.get(a, "constexpr") for a in names},
            {(names.index(a),): value for a, value in fixed.items()},
            {(names.index(a),): [["tt.divisibility", 16]] for a in whole},
        )
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        target = GPUTarget("cuda", capability, 32)
        assert compile(source, target=target, options=options).metadata.shared <= room
"""


@pytest.mark.parametrize("script", [SHARED_MEMORY, TREE_SHARED_MEMORY], ids=["dropout", "tree"])
def test_kernels_fit_the_shared_memory_of_each_device(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr

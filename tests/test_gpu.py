"""Tests that need a CUDA device: run them with `pytest -m gpu`."""

from __future__ import annotations

import gc
import shutil
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from tiny_models import (
    adapted,
    continued,
    generated,
    gradients,
    logprobs,
    model_of,
    noted_widths,
    one_pack,
    prompts,
    queries,
    texts,
    tiny,
    tiny_of_any_kind,
)
from training_runs import as_if_killed, losses, steps

from qlora_harness.fused import attention, dropout, fp8, fp8_weights, graphs, host_memory, ops
from qlora_harness.fused.bordered import Bordered, Projection, Scratch
from qlora_harness.fused.dropout import Masks
from qlora_harness.fused.fp8_group import Fp8Group
from qlora_harness.fused.host_memory import HostMemory
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.fused.packed_row import PackedRow
from qlora_harness.model.base import load_base
from qlora_harness.model.lora import attach_lora
from qlora_harness.model.source import find_base
from qlora_harness.score import generator
from qlora_harness.score.packed_forward import PackedModel
from qlora_harness.score.prefix_tree import Query, plan
from qlora_harness.score.tree_attention import TreeAttention, tree_blocks
from qlora_harness.settings import CHECKPOINTING, COMPUTE, Quant
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.batches import pack_batch, pad_batch
from qlora_harness.train.memory_meter import MemoryMeter
from qlora_harness.train.memory_plan import measure_shape, predict_memory

pytestmark = pytest.mark.gpu
every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def train(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    from qlora_harness.train.run import run_training

    values: dict[str, Any] = {
        "model": str(model), "dataset": "demo", "output_dir": str(folder), "max_length": 128,
        "max_steps": 4, "batch_size": 2, "grad_accum": 2, "lora_r": 8, "save_steps": 2,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return run_training(build_settings(values | changes))


def skip_without_fp8() -> None:
    reason = fp8.why_unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)


def test_nf4_weights_are_those_of_the_cpu(tiny_llama: Path) -> None:
    weights = {}
    for device in ("cpu", "cuda"):
        model = load_base(
            find_base(str(tiny_llama)), quant=Quant.NF4, double_quant=True,
            compute_dtype="float32", device=torch.device(device),
        )  # fmt: skip
        weight = model.model.layers[0].mlp.gate_proj.weight
        weights[device] = dequantize_4bit(weight.data, weight.quant_state).float().cpu()
    assert torch.equal(weights["cpu"], weights["cuda"])


@pytest.fixture(scope="module")
def one_head(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with a head large enough for the attention kernels, and so for graphs."""
    folder = tmp_path_factory.mktemp("models") / "one-head"
    shutil.copytree(tiny_llama, folder)
    config = transformers.AutoConfig.from_pretrained(
        folder, num_attention_heads=1, num_key_value_heads=1, head_dim=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
@pytest.mark.parametrize(
    ("optimizer", "graphs", "compute"),
    [
        ("paged_adamw_32bit", False, "bf16"),
        ("paged_adamw_8bit", False, "bf16"),
        ("adamw_torch", False, "bf16"),
        ("adamw_torch", True, "bf16"),
        ("adamw_torch", False, "fp8"),
    ],
)
def test_resumed_run_agrees_with_an_uninterrupted_one(
    tiny_llama: Path, one_head: Path, tmp_path: Path, quant: str, optimizer: str, graphs: bool,
    compute: str,
) -> None:  # fmt: skip
    if compute == "fp8":
        skip_without_fp8()
    options = {"quant": quant, "optimizer": optimizer, "lora_dropout": 0.1, "compute": compute}
    model = one_head if graphs else tiny_llama
    whole = train(model, tmp_path / "whole", **options)
    assert whole["status"] == "completed"
    assert whole["runtime"]["graph_passes"] == (8 if graphs else 0)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    as_if_killed(resumed, 4)
    second = train(model, resumed, **options)
    assert second["runtime"]["resumed"] is True
    assert losses(resumed) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert second["results"]["eval_loss"] == pytest.approx(whole["results"]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_torch"])
@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_training_in_float16_resumes_with_the_scale_of_its_loss(
    one_head: Path, tmp_path: Path, quant: str, optimizer: str
) -> None:
    options = {"quant": quant, "optimizer": optimizer, "lora_dropout": 0.0, "kernels": "none"}
    exact = train(one_head, tmp_path / "float32", compute_dtype="float32", **options)
    whole = train(one_head, tmp_path / "whole", compute_dtype="float16", **options)
    assert whole["quantization"]["compute_dtype"] == "float16"
    assert whole["computation"]["fused_layers"] is False
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "float32"), rel=0.02)
    assert whole["results"]["eval_loss"] == pytest.approx(exact["results"]["eval_loss"], rel=0.02)
    # As saved; scaled so little that each step counts; and so much that none does.
    for scale in (None, 2.0**10, 2.0**60):
        folder = tmp_path / f"resumed-{scale}"
        shutil.copytree(tmp_path / "whole", folder)
        as_if_killed(folder, 4)
        saved = folder / "checkpoints" / "checkpoint-2" / "scaler.pt"
        state = torch.load(saved)
        if scale is not None:
            state |= {"scale": scale, "_growth_tracker": 7}
            torch.save(state, saved)
        assert train(one_head, folder, compute_dtype="auto", **options)["runtime"]["resumed"]
        last = torch.load(folder / "checkpoints" / "checkpoint-4" / "scaler.pt")
        norms = [row["grad_norm"] is None for row in steps(folder)]
        if scale is None:
            whole_scaler = tmp_path / "whole" / "checkpoints" / "checkpoint-4" / "scaler.pt"
            assert last == torch.load(whole_scaler)
            assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
        elif scale < 2**20:
            assert (last["scale"], last["_growth_tracker"]) == (scale, 9)
            assert norms[2:] == [False, False]
        else:
            assert (last["scale"], last["_growth_tracker"]) == (scale / 4, 0)
            assert norms[2:] == [True, True]
            two, four = (
                load_file(folder / "checkpoints" / f"checkpoint-{n}" / "adapter_model.safetensors")
                for n in (2, 4)
            )
            assert all(torch.equal(two[name], four[name]) for name in two)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_scoring_in_float16_is_near_float32(one_head: Path, tmp_path: Path, quant: str) -> None:
    from lm_eval.api.instance import Instance

    from qlora_harness.score.adapter_lm import QloraAdapterLM
    from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

    train(one_head, tmp_path / "run", compute_dtype="float16", quant=quant)
    requests = [
        Instance("loglikelihood", {}, (question.prompt, f" {letter}"), place)
        for question in load_questions(DEMO_FILE)[:6]
        for place, letter in enumerate("ABCD")
    ]
    logprobs = []
    for dtype in ("auto", "float32"):
        adapter = str(tmp_path / "run" / "adapter")
        lm = QloraAdapterLM(peft=adapter, dtype=dtype, device="cuda", batch_size=4, verify=8)
        assert lm.session.settings_record()["dtype"] == ("float16" if dtype == "auto" else dtype)
        logprobs.append([score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.02)


def test_memory_is_measured_as_allocated_reserved_and_by_the_driver(
    tiny_llama: Path, tmp_path: Path
) -> None:
    memory = train(tiny_llama, tmp_path / "run", quant="nf4")["memory"]
    assert memory["device_type"] == "cuda"
    assert memory["cpu_peak_rss_bytes"] is None
    peaks = [memory[f"peak_{kind}_bytes"] for kind in ("allocated", "reserved", "device_used")]
    assert 0 < peaks[0] <= peaks[1] <= peaks[2]
    phases = [phase["phase"] for phase in memory["phases"]]
    assert phases == ["load", "evaluate_before", "train", "evaluate"]


def test_peak_of_a_phase_leaves_out_the_phases_inside_it() -> None:
    mib = 2**20
    meter = MemoryMeter(torch.device("cuda"), 0)
    before = torch.cuda.memory_allocated()
    with meter.phase("train"):
        torch.empty(30 * mib, dtype=torch.uint8, device="cuda")
        with meter.phase("evaluate_during"):
            torch.empty(200 * mib, dtype=torch.uint8, device="cuda")
        torch.empty(20 * mib, dtype=torch.uint8, device="cuda")
    peaks = {peak.phase: (peak.peak_allocated_bytes or 0) - before for peak in meter.phases}
    assert peaks == {"train": 30 * mib, "evaluate_during": 200 * mib}


@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_evaluations_during_training_change_neither_losses_nor_peak(
    tiny_llama: Path, tmp_path: Path, checkpointing: str
) -> None:
    options = {"quant": "nf4", "lora_dropout": 0.1, "checkpointing": checkpointing}
    without = train(tiny_llama, tmp_path / "without", **options)
    evaluated = train(tiny_llama, tmp_path / "with", eval_steps=1, **options)
    # As exact as two runs of one command on a GPU.
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-4)
    peaks = [record["memory"]["peak_allocated_bytes"] for record in (without, evaluated)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_scoring_on_the_gpu_agrees_with_the_cpu(tiny_llama: Path, quant: str) -> None:
    from lm_eval.api.instance import Instance

    from qlora_harness.score.adapter_lm import QloraAdapterLM
    from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions

    prompts = [q.prompt for q in load_questions(DEMO_FILE)[:6]]
    requests = [
        Instance("loglikelihood", {}, (prompt, f" {answer}"), place)
        for prompt in prompts
        for place, answer in enumerate((*"ABCD", "It is blue.", "It is black or grey."))
    ]
    logprobs = {}
    for device in ("cpu", "cuda"):
        lm = QloraAdapterLM(
            pretrained=str(tiny_llama), quant=quant, dtype="float32", device=device, batch_size=4
        )
        logprobs[device] = [logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert logprobs["cuda"] == pytest.approx(logprobs["cpu"], abs=1e-3)


def test_kernels_built_ahead_serve_the_packs() -> None:
    """A thread builds them, and packs of any length compile nothing."""
    from triton import knobs

    compiled: list[Any] = []
    model = PackedModel(tiny("llama").to(torch.bfloat16).cuda(), torch.float32)
    model.build_ahead()
    model.wait()
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what)
        for length in (3, 300):
            (pack,) = plan([Query([1] * length, [4])], pack_tokens=1024, window=1024)
            model.start(pack).reads()
    assert not compiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_kernel_expands_to_the_values_of_bitsandbytes(kind: str, nested: bool, dtype: str) -> None:
    from qlora_harness.fused.triton_weights import Loader

    torch.manual_seed(0)
    for heights, width in (((128, 64, 64), 192), ((4096,), 11008)):
        projections, expanded = [], []
        for height in heights:
            weight = torch.randn(height, width, device="cuda") * torch.rand(height, 1).cuda()
            packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            state.dtype = getattr(torch, dtype)
            expanded.append(dequantize_4bit(packed, state))
            layer = torch.nn.Parameter(packed, requires_grad=False)
            layer.quant_state = state  # type: ignore[attr-defined]
            down, up = torch.randn(8, width).cuda(), torch.randn(height, 8).cuda()
            projections.append(
                Projection(
                    SimpleNamespace(weight=layer, in_features=width, out_features=height),
                    *(torch.nn.Parameter(down), torch.nn.Parameter(up), 0.5, 0.0),
                )
            )
        group = Bordered(projections, Scratch())
        assert Loader(group, [p.layer.weight.quant_state for p in projections]).fits
        matrix = group.load(torch.empty(0, dtype=getattr(torch, dtype), device="cuda")).whole
        whole = torch.block_diag(*(p.up.detach() for p in projections if p.up is not None))
        downs = torch.cat([p.down.detach() * 0.5 for p in projections if p.down is not None])
        assert torch.equal(matrix[: group.height, :width], torch.cat(expanded))
        beside = matrix[: group.height, width : width + group.border]
        assert torch.equal(beside, whole.to(matrix.dtype))
        assert torch.equal(matrix[group.height :, :width], downs.to(matrix.dtype))


@pytest.mark.parametrize(
    ("kind", "quantised", "keys"),
    [
        ("llama", False, 2),
        ("llama", True, 2),
        ("qwen2", False, 2),
        ("qwen3", False, 2),
        ("qwen3", False, 1),
    ],
)
@every_checkpointing
def test_fused_step_in_float32_equals_peft(
    kind: str, quantised: bool, keys: int, checkpointing: str
) -> None:
    model = adapted(tiny(kind, quantised=quantised, num_key_value_heads=keys)).cuda()
    rows = texts([9, 3, 20, 1, 14])
    expected = gpu_step(model, rows, packed=False)
    FusedDecoder.attach(model, checkpointing)
    step = gpu_step(model, rows, packed=True)
    assert step[0] == pytest.approx(expected[0], abs=1e-4)
    for name, gradient in expected[1].items():
        assert (step[1][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize(
    ("heads", "keys", "size"), [(4, 4, 128), (8, 2, 128), (6, 2, 64), (3, 1, 64)]
)
def test_attention_of_short_texts_errs_no_more_than_flash_attention(
    heads: int, keys: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    starts = tuple(accumulate((1, 5, 64, 65, 130, 300, 512, 1000), initial=0))
    tokens = starts[-1]
    angles = (torch.randn(tokens, size // 2, device="cuda") * 3).repeat(1, 2)
    borders = torch.tensor(starts, dtype=torch.int32, device="cuda")
    x = torch.randn(tokens, (heads + 2 * keys) * size, device="cuda").bfloat16()
    dout = torch.randn(tokens, heads, size, device="cuda").bfloat16()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def both(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        row = PackedRow(cos.to(dtype), sin.to(dtype), borders, starts, 1000)
        turned = x.to(dtype, copy=True)
        ops.rotate(turned, heads + keys, row)
        out, state = attention.forward(turned, heads, keys, row, size**-0.5)
        back = attention.backward(dout.to(dtype), turned, out, state, row, size**-0.5)
        return out, back

    expected = both(torch.float32)
    assert attention.uses_triton(x, size)
    short = both(torch.bfloat16)
    monkeypatch.setattr(attention, "uses_triton", lambda *_: False)
    flash = both(torch.bfloat16)
    for a, b, c in zip(short, flash, expected, strict=True):
        assert not a.isnan().any()
        assert not torch.equal(a, b)  # two different kernels ran
        assert (a - c).norm() <= 1.5 * (b - c).norm()


def test_activations_come_back_from_the_host() -> None:
    """In any order, with the next one prefetched, and with pinned memory reused."""
    host = HostMemory()
    for order in ([4, 3, 2, 1, 0], [0, 3, 4, 1, 2], []):
        tensors = [torch.randn(3000, 2048, device="cuda") for _ in range(5)]  # two blocks each
        expected = [x.clone() for x in tensors]
        stored = []
        while tensors:
            stored.append(host.put(tensors.pop(0)))
            torch.full((3000, 2048), 7.0, device="cuda")  # takes memory that was given up
        assert [s.device_copy is not None for s in stored] == [False, False, False, True, True]
        for number in order:
            assert torch.equal(host.get(stored[number]), expected[number])
            if order[0] == 4 and number:
                assert stored[number - 1].device_copy is not None
        del stored
        assert 10 <= host._blocks.pinned == len(host._blocks._free) <= 12


def test_offload_keeps_nothing_without_gradients() -> None:
    model = adapted(tiny("llama")).cuda()
    FusedDecoder.attach(model, "offload")
    batch = send_to_device(pack_batch(texts([9, 20])), "cuda")
    host = model.get_base_model().forward.layers[0].host
    with torch.no_grad():
        model(**batch)
    assert not host._leaving
    loss = model(**batch).loss
    assert [x() is not None for x in host._leaving] == [True, True]
    loss.backward()
    assert [x() for x in host._leaving] == [None, None]


def test_gates_of_two_layers_in_three_wait_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = noted_widths(monkeypatch)
    steps = {}
    for name, checkpointing, memory in (
        ("none", "none", 10**9),
        ("away", "selective", 10**9),
        ("full", "selective", 0),
    ):
        monkeypatch.setattr(host_memory, "available_memory", lambda memory=memory: memory)
        model = adapted(tiny("llama", layers=6).to(torch.bfloat16)).cuda()
        FusedDecoder.attach(model, checkpointing)
        steps[name] = [
            gpu_step(model, texts([9, 20, 33, 14], seed), packed=True) for seed in range(3)
        ]
        assert widths == [256] * (12 if name == "away" else 0)  # 4 layers, 3 steps
        widths.clear()
    for name in ("away", "full"):
        for (loss, grads), (expected, others) in zip(steps[name], steps["none"], strict=True):
            assert loss == expected
            assert all(torch.equal(grads[n], others[n]) for n in others)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,down_proj"])
def test_dropout_is_the_same_with_every_checkpointing(targets: str) -> None:
    """Other masks in the backward pass would change gradients by a third."""
    steps = {}
    for checkpointing in ("none", "selective", "full", "offload"):
        model = adapted(tiny("llama").to(torch.bfloat16), dropout=0.3, targets=targets).cuda()
        FusedDecoder.attach(model, checkpointing)
        torch.manual_seed(3)
        steps[checkpointing] = gpu_step(model, texts([9, 20, 33, 14]), packed=True)
    expected, grads = steps.pop("none")
    for loss, others in steps.values():
        assert loss == pytest.approx(expected, rel=1e-4)
        for name, gradient in grads.items():
            assert (others[name] - gradient).norm() <= 0.01 * gradient.norm(), name


@pytest.mark.parametrize(("dropout", "compute"), [(0.0, "bf16"), (0.1, "bf16"), (0.1, "fp8")])
@every_checkpointing
def test_host_never_waits_for_a_pass(checkpointing: str, dropout: float, compute: str) -> None:
    """CUDA raises an error at every synchronisation."""
    if compute == "fp8":
        skip_without_fp8()
    model = adapted(tiny("llama", layers=4).to(torch.bfloat16), dropout=dropout).cuda()
    FusedDecoder.attach(model, checkpointing, compute=compute)
    batch = send_to_device(pack_batch(texts([9, 20, 33, 14])), "cuda")
    count = (batch["shift_labels"] != -100).sum()
    model(**batch, num_items_in_batch=count).loss.backward()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, num_items_in_batch=count).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small(kind: str, *, quantised: bool, dropout: float) -> Any:
    """A model with heads large enough for the attention kernels."""
    model = tiny(kind, quantised=quantised, num_key_value_heads=1, layers=3, num_attention_heads=1)
    return adapted(model.to(torch.bfloat16), dropout=dropout).cuda()


def accumulated(model: Any, batches: list[Any]) -> list[torch.Tensor]:
    """The losses of two steps on the same batches, and all their gradients."""
    torch.manual_seed(3)
    results: list[torch.Tensor] = []
    for _ in "12":
        for batch in batches:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**batch, num_items_in_batch=90).loss
            loss.backward()
            results.append(loss.detach())
        results += gradients(model).values()
    return results


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "quantised"), [("llama", True), ("qwen2", False), ("qwen3", True)]
)
def test_graphs_equal_the_same_kernels_launched_one_by_one(
    kind: str, quantised: bool, checkpointing: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [texts([9, 20], seed=1), texts([33, 12, 40], seed=2), texts([14, 15], seed=3)]
    batches = [send_to_device(pack_batch(each), "cuda") for each in rows]
    model = small(kind, quantised=quantised, dropout=dropout)
    decoder = FusedDecoder.attach(model, checkpointing)
    replayed = accumulated(model, batches)
    assert decoder.graphs.passes == 6
    decoder.graphs.release()
    with monkeypatch.context() as patch:
        patch.setattr(graphs._Capture, "record", lambda *_: None)
        launched = accumulated(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(replayed, launched, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(graphs.LayerGraphs, "serve", lambda *_: False)
        unpadded = accumulated(model, batches)
    whole, expected = (torch.cat([x.flatten() for x in each]) for each in (replayed, unpadded))
    assert (whole - expected).norm() <= 0.02 * expected.norm()


def test_graphs_follow_the_adapter_and_never_wait() -> None:
    model = small("llama", quantised=True, dropout=0.1)
    decoder = FusedDecoder.attach(model, "none")
    batches = [send_to_device(pack_batch(texts([40, 20])), "cuda")]
    before = accumulated(model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = accumulated(model, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    decoder.graphs.release()
    assert not torch.equal(after[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(after, accumulated(model, batches), strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("rows", "columns", "adapters", "rank"),
    [(700, 1024, 3, 64), (37, 1376, 1, 16), (300, 1024, 2, 256)],
)
def test_dropout_kernels_agree_with_plain_torch(
    rows: int, columns: int, adapters: int, rank: int, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(rows, columns + 64, device="cuda", dtype=kind)[:, :columns]
    down = torch.randn(adapters * rank, columns, device="cuda", dtype=kind) / columns**0.5
    d_inner = torch.randn(rows, adapters * rank, device="cuda", dtype=kind)
    seed = torch.tensor([2**61 + 5], device="cuda")
    drawn = [
        dropout.draw([(adapters, rows, columns)], 0.1, seed, x.device, packed=True)[0] for _ in "12"
    ]
    packed = drawn[0]
    assert dropout.can_pack(rank, x)
    assert packed.packed
    assert torch.equal(packed.keep, drawn[1].keep)
    shifts = torch.arange(8, device="cuda", dtype=torch.uint8)[:, None]
    groups = packed.keep.unflatten(2, (-1, 1, 64))
    bits = ((groups >> shifts) & 1).flatten(2)[..., :columns].bool()
    assert bits.float().mean(dim=(1, 2)).tolist() == [pytest.approx(0.9, abs=0.005)] * adapters
    plain = Masks(bits, packed.factor)
    # Products in float64; in bfloat16 what is left is one rounding.
    near: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 8e-3, "atol": 8e-3}
    )

    def alike(result: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(result.double(), expected, **near)

    wide = [t.double() for t in (x, down, d_inner)]
    beside = torch.empty(rows, adapters * rank + 8, device="cuda", dtype=kind)[:, 8:]
    result = dropout.products(x, down, packed, beside)
    alike(result, dropout.products(wide[0], wide[1], plain))
    assert torch.equal(result, beside)
    assert torch.equal(result, dropout.products(x, down, packed))
    first, second = x.clone(), wide[0].clone()
    dropout.add_products(first, d_inner, down, packed)
    dropout.add_products(second, wide[2], wide[1], plain)
    alike(first, second)
    result = dropout.gradients(d_inner, x, packed, 0.3, torch.float32)
    expected = dropout.gradients(wide[2], wide[0], plain, 0.3, torch.float64)
    assert (result.double() - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(result, dropout.gradients(d_inner, x, packed, 0.3, torch.float32))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@every_checkpointing
def test_fused_step_in_bfloat16_is_near_peft(checkpointing: str, dropout: float) -> None:
    model = adapted(tiny("llama").to(torch.bfloat16), dropout=dropout).cuda()
    rows = texts([9, 3, 20, 33, 14])
    expected = gpu_step(model, rows, packed=False)
    FusedDecoder.attach(model, checkpointing)
    step = gpu_step(model, rows, packed=True)
    assert step[0] == pytest.approx(expected[0], rel=0.01 if not dropout else 0.3)
    for name, gradient in expected[1].items():
        likeness = torch.nn.functional.cosine_similarity(
            step[1][name].flatten(), gradient.flatten(), dim=0
        )
        assert likeness > (0.99 if not dropout else 0.0), name


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize(("quant", "nested"), [("nf4", True), ("fp4", False), (None, False)])
@pytest.mark.parametrize(
    ("heights", "adapters", "width", "rank"),
    [
        ((4096,), (True,), 1024, 64),
        ((512, 128, 128), (True, True, True), 576, 16),
        ((48, 16, 80), (True, False, True), 64, 3),
        ((1408, 1408), (False, True), 448, 64),
        ((64, 192), (False, False), 192, 8),
    ],
)
def test_fp8_kernels_agree_with_plain_torch(
    heights: tuple[int, ...], adapters: tuple[bool, ...], width: int, rank: int,
    quant: str | None, nested: bool, masked: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rounded values are equal; products are, but for the rounding of sums."""
    skip_without_fp8()
    torch.manual_seed(0)
    projections = []
    for height, has_adapter in zip(heights, adapters, strict=True):
        weight = (torch.randn(height, width) * torch.rand(height, 1)).bfloat16().cuda()
        frozen = torch.nn.Parameter(weight, requires_grad=False)
        if quant is not None:
            packed, state = quantize_4bit(weight, quant_type=quant, compress_statistics=nested)
            frozen = torch.nn.Parameter(packed, requires_grad=False)
            frozen.quant_state = state  # type: ignore[attr-defined]
        bias = torch.randn(height, device="cuda").bfloat16() if height % 64 else None
        layer = SimpleNamespace(weight=frozen, in_features=width, out_features=height, bias=bias)
        down, up = (
            torch.nn.Parameter(torch.randn(shape, device="cuda")) if has_adapter else None
            for shape in ((rank, width), (height, rank))
        )
        projections.append(Projection(layer, down, up, 0.5, 0.1))
    tokens = 300
    x = (torch.randn(tokens, width) * torch.exp(3 * torch.randn(tokens, 1))).bfloat16().cuda()
    dy = torch.randn(tokens, sum(heights), device="cuda").bfloat16()
    x[7] = 0
    group = Fp8Group(projections, Scratch())
    masks = None
    if masked and any(adapters):
        seed = torch.tensor([5])
        (masks,) = dropout.draw([group.mask_shape(tokens)], 0.1, seed, x.device, packed=False)

    def everything() -> list[torch.Tensor]:
        exact = [
            group._weights.load(x, transposed=transposed).values.float()
            for transposed in (False, True)
        ]
        quantised = fp8.quantise(x)
        y, inner = group.forward(x, masks)
        dx, d_inner = group.backward(dy, masks)
        gradients = group.gradients(dy, d_inner, x, inner, masks)
        return [
            *(*exact, quantised.values.view(torch.uint8), quantised.scales, y, dx),
            *(gradient for gradient in gradients if gradient is not None),
        ]

    by_kernels = everything()
    monkeypatch.setattr(fp8, "usable", lambda x: False)
    monkeypatch.setattr(fp8_weights, "usable", lambda x: False)
    for number, (a, b) in enumerate(zip(by_kernels, everything(), strict=True)):
        if number < 4:
            assert torch.equal(a, b)
        else:
            assert (a - b).float().norm() <= 6e-3 * b.float().norm()


@pytest.mark.parametrize("columns", [64, 4096, 11008])
def test_operations_round_their_results_as_a_separate_kernel_does(columns: int) -> None:
    skip_without_fp8()
    torch.manual_seed(0)
    x, add, dy = (torch.randn(70, columns, device="cuda").bfloat16() for _ in range(3))
    gates = (torch.randn(70, 2 * columns) * torch.exp(3 * torch.randn(70, 1))).bfloat16().cuda()
    weight = torch.randn(columns, device="cuda").bfloat16()
    gates[3] = 0
    dy[4] = 0
    out = torch.empty(70, columns + 64, device="cuda", dtype=torch.bfloat16)[:, :columns]

    def check(rounded: fp8.Quantised, result: torch.Tensor) -> None:
        expected = fp8.quantise(result)
        assert torch.equal(rounded.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(rounded.scales, expected.scales)

    rounded = fp8.room(70, columns, x)
    ops.rms_norm(x, weight, 1e-5, out, add, rounded)
    check(rounded, out)
    ops.swiglu(gates, out, rounded)
    check(rounded, out)
    plain, product = gates.clone(), dy.clone()
    ops.swiglu_backward(plain, product)
    wide = fp8.room(70, 2 * columns, x)
    ops.swiglu_backward(gates, dy, wide)
    check(wide, gates)
    torch.testing.assert_close(gates, plain, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(dy, product, rtol=2**-7, atol=1e-6)


@every_checkpointing
@pytest.mark.parametrize(
    ("kind", "quantised", "targets"),
    [
        ("llama", True, "all-linear"),
        ("qwen2", False, "all-linear"),
        ("llama", True, "o_proj,gate_proj"),
    ],
)
def test_fp8_step_is_near_bfloat16(
    kind: str, quantised: bool, targets: str, checkpointing: str
) -> None:
    skip_without_fp8()
    steps = []
    for compute in COMPUTE:
        model = adapted(tiny(kind, quantised=quantised).to(torch.bfloat16), targets=targets).cuda()
        assert FusedDecoder.reason_against_fp8(model) is None
        FusedDecoder.attach(model, checkpointing, compute=compute)
        steps.append(gpu_step(model, texts([9, 3, 20, 33, 14]), packed=True))
    (expected, grads), (loss, others) = steps
    assert loss == pytest.approx(expected, rel=0.005)
    every, rounded = (torch.cat([s[n].flatten() for n in grads]) for s in (grads, others))
    assert (rounded - every).norm() <= 0.15 * every.norm()


def test_fp8_packs_are_near_bfloat16() -> None:
    skip_without_fp8()
    pack = one_pack(queries(40))
    model = model_of("llama", False, 2, "all-linear").to(torch.bfloat16).cuda()
    expected, rounded = (
        PackedModel(model, None, compute=compute).start(pack).reads().logprobs
        for compute in COMPUTE
    )
    assert 0 < np.abs(rounded - expected).max() < 1


@pytest.mark.parametrize("targets", [None, "all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize(
    ("kind", "quantised", "keys"),
    [
        ("llama", False, 4),
        ("llama", False, 2),
        ("llama", True, 2),
        ("qwen2", False, 1),
        ("qwen3", False, 2),
    ],
)
def test_fused_packs_in_float32_equal_the_models_own_modules(
    kind: str, quantised: bool, keys: int, targets: str | None
) -> None:
    pack = one_pack(queries(40))
    model = model_of(kind, quantised, keys, targets)
    by_cpu = logprobs(model, pack)
    model = model_of(kind, quantised, keys, targets).cuda()
    expected = logprobs(model, pack, fused=False)
    assert expected == pytest.approx(by_cpu, abs=1e-3)
    for flex in (True, False):
        assert logprobs(model, pack, flex=flex) == pytest.approx(expected, abs=1e-4)


def test_fused_packs_with_small_heads() -> None:
    pack = one_pack(queries(20, 40))
    for kind in ("llama", "qwen3"):
        model = tiny_of_any_kind(kind).cuda()
        expected = logprobs(model, pack, fused=False)
        assert logprobs(model, pack) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_fused_packs_in_bfloat16_are_near_float32(targets: str | None) -> None:
    pack = one_pack(queries(40))
    expected = logprobs(model_of("llama", False, 2, targets), pack)
    model = model_of("llama", False, 2, targets).to(torch.bfloat16).cuda()
    assert logprobs(model, pack) == pytest.approx(expected, abs=0.04)


def test_attention_of_fused_packs_copies_nothing() -> None:
    """Queries, keys and values are views of one row; the output is contiguous by token."""
    projected = torch.randn(16384, (4 + 2 * 2) * 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = projected.view(16384, 8, 64).split([4, 2, 2], dim=1)
    blocks = tree_blocks(np.full(16384, 16384, dtype=np.int32), projected.device)
    with torch.inference_mode():
        TreeAttention((), blocks)(q, k, v, 0.125)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = TreeAttention((), blocks)(q, k, v, 0.125)
        peak = torch.cuda.max_memory_allocated() - before
    assert out.is_contiguous()
    assert peak < out.nbytes + projected.nbytes // 8  # no copy of the row
    causal = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),  # type: ignore[misc]
        is_causal=True,
        scale=0.125,
        enable_gqa=True,
    )
    assert torch.allclose(out, causal[0].transpose(0, 1), atol=2e-2)


@pytest.mark.parametrize(
    ("kind", "quantised", "keys", "targets", "shared"),
    [
        ("llama", True, 2, "all-linear", 5),
        ("llama", True, 2, "all-linear", 0),
        ("qwen2", False, 1, None, 150),
    ],
)
def test_generated_tokens_in_float32_are_those_of_transformers(
    kind: str, quantised: bool, keys: int, targets: str | None, shared: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(generator, "MOST_ROWS", 4)
    model = model_of(kind, quantised, keys, targets).cuda()
    ids = prompts(9, shared=shared)
    expected = continued(model, ids, 12, -1)
    for flex, fused in ((True, False), (False, True), (True, True)):
        packed = PackedModel(model, None, flex=flex, fused=fused)
        assert packed.has_graphs == (flex and fused)
        assert generated(packed, ids, 12, -1) == expected
        packed.close()


def test_generating_with_graphs_equals_launching_each_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generator, "MOST_ROWS", 8)
    packed = PackedModel(small("llama", quantised=True, dropout=0.0).eval(), None)
    # Texts that grow beyond their first page, and end early.
    ids = [[*prompt, *range(1, 55), *range(1, 55)] for prompt in prompts(20, shared=30)]
    replayed = generated(packed, ids, 40, 7)
    assert packed.has_graphs
    packed.has_graphs = False
    assert generated(packed, ids, 40, 7) == replayed


def gpu_step(model: Any, rows: Any, *, packed: bool) -> Any:
    half = next(model.parameters()).dtype == torch.bfloat16
    batch = send_to_device(pack_batch(rows) if packed else pad_batch(rows, 0), "cuda")
    count = (batch["labels"][:, 1:] != -100).sum()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
        loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose activations for 8,192 tokens dwarf everything the formulas ignore."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=8000,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("eight") / "model"
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def graph_bytes() -> int:
    """The memory of graphs, which torch counts as free between their passes."""
    segments = torch.cuda.memory_snapshot()
    pools = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(int(s["total_size"] - s["allocated_size"]) for s in pools)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
@pytest.mark.parametrize(
    ("checkpointing", "compute", "bound", "tolerance"),
    [
        *((checkpointing, "bf16", 0, 0.15) for checkpointing in CHECKPOINTING),
        *((checkpointing, "fp8", 0, 0.15) for checkpointing in CHECKPOINTING),
        *((checkpointing, "bf16", 2**39, 0.25) for checkpointing in ("none", "full")),  # as graphs
    ],
)
def test_peak_is_near_the_prediction(
    eight_layers: Path, quant: str, checkpointing: str, compute: str, bound: int,
    tolerance: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the second AdamW step, without cuBLAS's workspace."""
    if compute == "fp8":
        skip_without_fp8()
    monkeypatch.setattr(graphs, "_DEVICE_BOUND", bound)
    changes = {"quant": quant, "checkpointing": checkpointing, "optimizer": "adamw_torch"}
    settings = build_settings(changes | {"lora_r": 16, "lora_dropout": 0.0, "compute": compute})
    rows = [{"input_ids": list(range(1, 513)), "labels": [-100] * 256 + [7] * 256}] * 16
    gc.collect()
    warm_up = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (warm_up @ warm_up).sum().backward()
    del warm_up
    before = torch.cuda.memory_allocated()
    batch = send_to_device(pack_batch(rows), "cuda")
    model: Any = load_base(
        find_base(str(eight_layers)), quant=Quant(quant), double_quant=True,
        compute_dtype="bfloat16", device=torch.device("cuda"),
    )  # fmt: skip
    model = attach_lora(model, r=16, alpha=16, dropout=0.0, targets="all-linear").train()
    decoder = FusedDecoder.attach(model, checkpointing, compute=compute)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before + graph_bytes()
    plan = predict_memory(measure_shape(str(eight_layers), None, "all-linear"), settings, 8192)
    assert plan.graphs == (decoder.graphs.passes == 2) == (bound > 0)
    assert peak == pytest.approx(plan.peak, rel=tolerance)

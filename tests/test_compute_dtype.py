"""float16 on GPUs without bfloat16: the choice, the refusals, the plan and skipped steps."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lm_eval.api.instance import Instance
from training_runs import Train, as_if_killed

from qlora_harness.cli import main as cli
from qlora_harness.errors import SettingsError, TrainingError
from qlora_harness.fused.model import FusedDecoder
from qlora_harness.model.base import dequantise, load_base
from qlora_harness.model.compute_dtype import check_dtype, own_dtype
from qlora_harness.model.lora import attach_lora
from qlora_harness.model.source import find_base
from qlora_harness.score.adapter_lm import QloraAdapterLM
from qlora_harness.score.model_arguments import resolve_dtype
from qlora_harness.settings import Quant
from qlora_harness.settings_checks import build_settings, with_dtype
from qlora_harness.study import devices
from qlora_harness.study.checks import with_one_dtype
from qlora_harness.study.definition import build_study
from qlora_harness.study.devices import Device, visible_devices
from qlora_harness.train.arguments import training_arguments
from qlora_harness.train.compute_dtype import with_compute_dtype
from qlora_harness.train.measured_step import Clock, MeasuredStep
from qlora_harness.train.memory_plan import LADDER, with_rung
from qlora_harness.train.trainer import StepLog

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


def state(device: torch.device) -> Any:
    return SimpleNamespace(
        device=device, local_process_index=0, num_processes=1, is_main_process=True
    )


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 7.5, which torch says has bfloat16."""
    about = SimpleNamespace(major=7, minor=5, name="Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about.name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


@pytest.mark.usefixtures("t4")
def test_training_without_bfloat16_takes_float16(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(given: str, recorded: str | None = None) -> str:
        settings = build_settings({"compute_dtype": given})
        return with_compute_dtype(settings, state(GPU), recorded).model.compute_dtype

    assert chosen("auto") == "float16"
    (line,) = capsys.readouterr().out.splitlines()
    assert "Tesla T4" in line
    assert "float16" in line
    assert [chosen("float16"), chosen("float32"), chosen("auto", "float32")] == [
        *("float16", "float32", "float32")
    ]
    assert capsys.readouterr().out == ""
    for given, recorded in (("bfloat16", None), ("auto", "bfloat16")):
        with pytest.raises(SettingsError, match="--compute-dtype float16"):
            chosen(given, recorded)
    with pytest.raises(SettingsError, match="--checkpointing offload"):
        with_compute_dtype(build_settings({"checkpointing": "offload"}), state(GPU), None)


def test_other_devices_have_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ampere)
    assert [own_dtype(device) for device in (GPU, CPU)] == [("bfloat16", None)] * 2
    check_dtype("bfloat16", GPU)


def test_training_in_float16_is_refused_on_a_cpu(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(compute_dtype="float16", output_dir="run") == 2
    assert "--compute-dtype float16 needs a GPU" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.usefixtures("t4")
def test_scoring_without_bfloat16_takes_float16(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qlora_harness"):
        recorded = (None, "bfloat16", "float16")
        assert [resolve_dtype("auto", dtype) for dtype in recorded] == ["float16"] * 3
    assert [record.getMessage().count("Tesla T4") for record in caplog.records] == [1, 1, 1]
    assert resolve_dtype("auto", "float32") == "float32"
    assert resolve_dtype("float16", "bfloat16") == "float16"
    with pytest.raises(SettingsError, match="dtype=float16"):
        resolve_dtype("bfloat16", None)


@pytest.mark.usefixtures("t4")
def test_plan_is_for_float16_and_pefts_modules(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["plan", "--model", str(tiny_llama), "--max-length", "64"]
    assert cli(flags) == 0
    first, title, _, *rows = capsys.readouterr().out.splitlines()
    assert "Tesla T4" in first
    assert "float16, rank 64" in title
    assert "PEFT's own modules" in title
    assert {row.split()[0] for row in rows[:-1]} == {"full", "none"}
    assert cli([*flags, "--compute-dtype", "bfloat16"]) == 0  # for another machine
    assert "bfloat16, rank 64" in capsys.readouterr().out.splitlines()[0]


def test_adapter_stays_in_float32_with_every_way_to_save_memory() -> None:
    settings = with_dtype(build_settings({}), "float16")
    lean = with_rung(settings, LADDER[-1] | {"checkpointing": "full"})
    assert lean.lora.adapter_dtype == "float32"
    assert lean.optimization.optimizer == "paged_adamw_8bit"


def test_every_run_of_a_study_takes_the_dtype_that_all_gpus_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = "GPU-a, 0, 15000, 7.5\nGPU-b, 1, 81000, 9.0\nGPU-c, 2, [N/A], [N/A]\n"
    done = SimpleNamespace(stdout=lines)
    monkeypatch.setattr(devices.subprocess, "run", lambda *words, **options: done)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,1,2,MIG-d")
    seen = visible_devices()
    assert seen == [
        Device("GPU-a", 15000 * 2**20, False), Device("1", 81000 * 2**20), Device("2", None),
        Device("MIG-d", None),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arms = {"nf4": {"quant": "nf4"}, "float32": {"quant": "bf16", "compute_dtype": "float32"}}
    study = build_study({"arms": arms, "settings": {"dataset": "demo"}}, {}, tmp_path / "s.yaml")

    def dtypes(*gpus: Device) -> set[tuple[str, str]]:
        cells = with_one_dtype(study, gpus).cells
        return {(cell.arm, cell.settings.model.compute_dtype) for cell in cells}

    assert dtypes(*seen) == {("nf4", "float16"), ("float32", "float32")}
    assert dtypes(*seen[1:]) == {("nf4", "auto"), ("float32", "float32")}


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_base_and_adapter_in_float16(tiny_llama: Path, quant: str) -> None:
    options: dict[str, Any] = {"quant": Quant(quant), "double_quant": True, "device": CPU}
    model, exact = (
        load_base(find_base(str(tiny_llama)), compute_dtype=dtype, **options)
        for dtype in ("float16", "float32")
    )
    for name, weight in exact.named_parameters():
        other = model.get_parameter(name)
        if weight.is_floating_point():
            assert other.dtype == torch.float16
            assert torch.equal(other, weight.to(torch.float16))  # the checkpoint has bfloat16
        else:
            assert torch.equal(other, weight)
    assert FusedDecoder.reason_against(model) is not None
    adapted = attach_lora(model, r=4, alpha=8, dropout=0.0, targets="all-linear")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = adapted(ids).logits
        assert logits.float() == pytest.approx(exact(ids).logits.float(), abs=0.01)
        if quant == "nf4":
            before = model(ids).logits
            dequantise(model, "float16")
            assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("quant", ["nf4", "bf16"])
def test_scoring_in_float16_is_near_float32(tiny_llama: Path, quant: str) -> None:
    pairs = [("one two three", " four"), ("one two three", " five six"), ("seven", " eight")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    logprobs = {}
    for dtype in ("float16", "float32"):
        lm = QloraAdapterLM(
            pretrained=str(tiny_llama), quant=quant, dtype=dtype, device="cpu", batch_size=2,
            verify=3,
        )  # fmt: skip
        assert lm.session.settings_record()["dtype"] == dtype
        assert lm.session.path.packed
        assert lm.session.path.fused is (dtype == "float32")
        logprobs[dtype] = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert logprobs["float16"] == pytest.approx(logprobs["float32"], abs=0.02)
    assert logprobs["float16"] != logprobs["float32"]


def test_trainer_scales_the_loss_in_float16_only(tmp_path: Path) -> None:
    optimization = build_settings({}).optimization
    options: dict[str, Any] = {
        "checkpoint_dir": tmp_path, "steps": 1, "save_steps": 1, "report_to": "none",
        "use_cpu": True, "fused": False,
    }  # fmt: skip
    for dtype, flags in (("float16", (True, False)), ("bfloat16", (False, True))):
        arguments = training_arguments(optimization, compute_dtype=dtype, **options)
        assert (arguments.fp16, arguments.bf16) == flags


class FakeTrainer:
    """As much of a trainer as `StepLog` needs; its scaler is there in float16 only."""

    def __init__(self, scaler: object) -> None:
        self.accelerator = SimpleNamespace(scaler=scaler)
        self.logged: list[float | None] = []

    def log_step(self, step: MeasuredStep, loss: float, grad_norm: float | None) -> None:
        self.logged.append(grad_norm)

    def is_world_process_zero(self) -> bool:
        return False


def log_of(tmp_path: Path, scaler: object, *numbers: tuple[float, float]) -> StepLog:
    """A log of steps with these losses and gradient norms."""
    memory: Any = SimpleNamespace(sample=dict)
    log = StepLog(tmp_path, memory, [])
    log.trainer = cast(Any, FakeTrainer(scaler))
    for number, (loss, norm) in enumerate(numbers, 1):
        begun = Clock(CPU)
        values = torch.tensor([loss, norm, 8, 4], dtype=torch.float64)
        log.add_row(MeasuredStep(number, 0.0, 1e-3, begun, Clock(CPU), values))
    return log


def test_a_skipped_step_has_no_gradient_norm(tmp_path: Path) -> None:
    norms = (math.inf, math.nan, 0.5)
    log = log_of(tmp_path, object(), *((2.0, norm) for norm in norms))
    assert [row["grad_norm"] for row in log.rows] == [None, None, 0.5]
    assert cast(Any, log.trainer).logged == [None, None, 0.5]


@pytest.mark.parametrize(
    ("scaler", "numbers", "last"),
    [
        (None, [(2.0, math.inf)], 1),
        (object(), [(math.nan, math.nan)], 1),
        (object(), [(2.0, math.inf)] * 18, 18),  # a scale below 1 won't help
        (object(), [*[(2.0, math.inf)] * 17, (2.0, 0.5), (2.0, math.inf), (math.inf, 0.5)], 20),
    ],
)
def test_other_infinities_stop_the_run(
    tmp_path: Path, scaler: object, numbers: list[tuple[float, float]], last: int
) -> None:
    with pytest.raises(TrainingError, match=f"^step {last}: ") as caught:
        log_of(tmp_path, scaler, *numbers)
    assert ("--compute-dtype float32" in str(caught.value)) is (scaler is not None)


def test_a_damaged_scaler_makes_a_checkpoint_useless(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"output_dir": "run", "max_steps": 2, "save_steps": 1}
    assert train(**options) == 0
    as_if_killed("run")
    Path("run/checkpoints/checkpoint-2/scaler.pt").write_bytes(b"PK")
    capsys.readouterr()
    assert train(**options) == 0
    assert "skipped checkpoint-2: scaler.pt" in capsys.readouterr().out

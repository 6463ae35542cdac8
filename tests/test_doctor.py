"""`qlora-harness doctor`: a state and a remedy for each check."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional
import pytest
import torch
from packaging.requirements import Requirement

from qlora_harness import doctor
from qlora_harness.lm_eval_compat import hook


def test_the_command_reports_the_state_of_each_part(tmp_path: Path) -> None:
    (tmp_path / "five_shot_mmlu_val.json").touch()
    done = subprocess.run(
        [str(Path(sys.executable).with_name("qlora-harness")), "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "QLORA_MMLU_DIR": str(tmp_path)},
        timeout=120,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    states = {line[2:18].strip(): line[0] for line in lines}
    assert done.returncode == 0
    assert (states["lm_eval plugin"], states["MMLU files"], states["torch"]) == ("✓", "✓", "✓")
    assert states["Hugging Face Hub"] == "!"


@pytest.mark.parametrize(
    ("off", "cause"), [("1", "QLORA_HARNESS_NO_HOOK"), ("0", "qlora_harness_hook.pth")]
)
def test_a_missing_plugin_is_an_error_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], off: str, cause: str
) -> None:
    monkeypatch.setattr(hook, "is_registered", lambda: False)
    monkeypatch.setenv("QLORA_HARNESS_NO_HOOK", off)
    plugin = doctor._plugin()
    monkeypatch.setattr(doctor, "checks", lambda: iter([plugin]))
    assert doctor.diagnose() == 1
    assert plugin.state == "missing"
    assert cause in plugin.value
    assert capsys.readouterr().out.startswith("✗")


def test_versions_are_compared_with_the_tested_ranges() -> None:
    states = {
        text: doctor._package(Requirement(text)).state
        for text in ("torch>=1", "torch<1", "no-such-package-here")
    }
    assert list(states.values()) == ["ok", "warning", "missing"]


@pytest.mark.parametrize(
    ("major", "formats"),
    [(7, "no bf16: float16 will be used"), (8, "bf16"), (10, "bf16"), (9, "bf16 and fp8")],
)
def test_a_gpu_is_judged_by_its_own_formats(
    monkeypatch: pytest.MonkeyPatch, major: int, formats: str
) -> None:
    about = SimpleNamespace(major=major, name="Card", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    check = doctor._gpu(0)
    assert (check.state, check.value.rpartition(", ")[2]) == ("ok", formats)


def test_a_broken_package_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    states = {check.name: check.state for check in doctor.checks()}
    assert states["Hugging Face Hub"] == "missing"
    assert states["MMLU files"] in ("ok", "warning")


def test_the_port_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}/hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert doctor._hub().state == "ok"


def test_a_failing_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._quantises("cpu").state == "ok"

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    check = doctor._quantises("cpu")
    assert (check.state, check.value) == ("missing", "bitsandbytes fails: no kernel image")

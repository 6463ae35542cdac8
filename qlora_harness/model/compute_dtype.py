"""Which 16-bit dtype a device computes in: GPUs before Ampere, such as a T4, have no bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_harness.errors import SettingsError

if TYPE_CHECKING:
    import torch

AMPERE = 8  # major number of its compute capability


def has_bfloat16(device: torch.device | int) -> bool:
    """Whether a device computes in bfloat16; every CPU does.

    torch's `is_bf16_supported` also counts emulation by float32, which every GPU has. Triton, too,
    supports only the GPUs that have bfloat16. A number is a GPU's.
    """
    import torch

    if not isinstance(device, int) and device.type != "cuda":
        return True
    major: int = torch.cuda.get_device_properties(device).major
    return major >= AMPERE


def own_dtype(device: torch.device) -> tuple[str, str | None]:
    """Returns the 16-bit dtype of a device, and a line about it if that isn't bfloat16."""
    if has_bfloat16(device):
        return "bfloat16", None
    return "float16", f"on {_name(device)}: float16, since it has no bfloat16"


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raises SettingsError if a device can't compute in a dtype."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        raise SettingsError(
            f"{_name(device)} can't compute in bfloat16",
            "Use --compute-dtype float16, or dtype=float16 to score",
        )


def check_training_dtype(dtype: str, device: torch.device) -> None:
    """Raises SettingsError if a device can't train in a dtype."""
    check_dtype(dtype, device)
    if dtype == "float16" and device.type == "cpu":
        raise SettingsError(
            "--compute-dtype float16 needs a GPU: accelerate scales no losses on a CPU",
            "Use --compute-dtype bfloat16 or float32",
        )


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)

"""Which precision is computed in where the one asked for is not to be had, or not fast."""

import pytest
import torch

from bge_accel.kernels.onednn import cpu_has_bf16
from bge_accel.models import precision
from bge_accel.models.precision import choose_precision, cpu_is_faster_in_bf16, default_device, resolve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=["fast", "slow", "none"])
def bf16_of_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU whose bfloat16 is fast, slow, or not there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param != "none")
    monkeypatch.setattr(precision, "cpu_is_faster_in_bf16", lambda: request.param == "fast")
    return request.param


@pytest.mark.parametrize(
    ("fp16", "bf16", "device", "dtype"),
    [
        (False, False, CPU, torch.float32),
        (False, False, GPU, torch.float32),
        (True, False, GPU, torch.float16),
        (False, True, GPU, torch.bfloat16),
        (True, False, torch.device("mps"), torch.float16),
    ],
)
def test_gives_what_was_asked_for(fp16: bool, bf16: bool, device: torch.device, dtype: torch.dtype) -> None:
    assert resolve_dtype(fp16, bf16, device) == (dtype, None)


def test_on_a_cpu_fp16_becomes_what_is_fast(bf16_of_cpu: str) -> None:
    dtype, warning = resolve_dtype(True, False, CPU)
    assert dtype == (torch.bfloat16 if bf16_of_cpu == "fast" else torch.float32)
    assert warning is not None and "fp16 needs a GPU" in warning
    assert warning.endswith(f"computing in {str(dtype).removeprefix('torch.')} instead")
    name, told = choose_precision("fp16", CPU)
    assert (name, told) == ("bf16" if bf16_of_cpu == "fast" else "no", warning)


def test_on_a_cpu_bf16_is_given_where_it_is_there(bf16_of_cpu: str) -> None:
    dtype, warning = resolve_dtype(False, True, CPU)
    if bf16_of_cpu == "none":
        assert dtype == torch.float32 and "no bfloat16 arithmetic: computing in float32 instead" in str(warning)
    else:
        assert dtype == torch.bfloat16
        assert (warning or "").startswith("bfloat16 is slower than float32" if bf16_of_cpu == "slow" else ""), warning
        assert (warning is None) == (bf16_of_cpu != "slow")
    assert choose_precision("bf16", CPU) == ("no" if bf16_of_cpu == "none" else "bf16", warning)


def test_auto_is_what_is_fast_without_a_word(bf16_of_cpu: str) -> None:
    assert choose_precision("auto", CPU) == ("bf16" if bf16_of_cpu == "fast" else "no", None)
    assert choose_precision("fp8", CPU) == ("fp8", None) and choose_precision(None, CPU) == (None, None)


@pytest.mark.parametrize(
    ("has_bf16", "machine", "amx", "amd", "expected"),
    [
        (True, "x86_64", True, False, True),
        (True, "x86_64", False, True, True),
        (True, "x86_64", False, False, False),
        (True, "aarch64", False, False, True),
        (False, "x86_64", True, True, False),
    ],
)
def test_the_kind_of_cpu_decides(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, machine: str, amx: bool, amd: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(precision, "_is_amd", lambda: amd)
    assert cpu_is_faster_in_bf16() is expected


def test_this_cpu_answers() -> None:
    assert cpu_is_faster_in_bf16() in (True, False) and (cpu_has_bf16() or not cpu_is_faster_in_bf16())


def test_refuses_both_and_asks_the_default_device() -> None:
    with pytest.raises(ValueError, match="--fp16 and --bf16 exclude each other"):
        resolve_dtype(True, True, GPU)
    for asked in ((True, False), (False, True), (False, False)):
        assert resolve_dtype(*asked) == resolve_dtype(*asked, default_device())

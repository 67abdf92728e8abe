"""What `make same-bits` takes for a difference."""

import json
from pathlib import Path

import numpy as np
import same_bits
from safetensors.numpy import save_file


def write(folder: Path, *, weight: float = 1.0, seconds: float = 1.0, loss: float = 0.5, extra: bool = False) -> Path:
    (folder / "out").mkdir(parents=True)
    save_file({"weight": np.float32([weight])}, folder / "out" / "model.safetensors")
    row = {"step": 1, "loss": loss, "eval_seconds": seconds}
    (folder / "out" / "train_log.jsonl").write_text(json.dumps(row) + "\n")
    if extra:
        (folder / "out" / "new").touch()
    return folder


def test_timings_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    old = write(tmp_path / "old")
    assert same_bits.compare(old, write(tmp_path / "slower", seconds=2)) == []
    next_float = float(np.nextafter(np.float32(1), np.float32(2)))
    assert same_bits.compare(old, write(tmp_path / "a", weight=next_float)) == ["out/model.safetensors differs"]
    assert same_bits.compare(old, write(tmp_path / "b", loss=0.5000001)) == ["out/train_log.jsonl differs"]
    assert same_bits.compare(old, write(tmp_path / "c", extra=True)) == ["out/new is in one alone"]


def test_each_setting_of_a_case_is_found(tmp_path: Path) -> None:
    """A word in capitals stands for a file; none is left over."""
    names = same_bits.write_data(tmp_path / "data")
    for case in same_bits.cases().values():
        for part in same_bits.arguments(case, names):
            assert not part.startswith(str(tmp_path)) or Path(part).exists(), part

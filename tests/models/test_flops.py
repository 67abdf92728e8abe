"""Floating-point operations of a model, beside torch's own count of what it runs."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bge_accel.encoding.batching import make_token_batch
from bge_accel.kernels.last_layer import linears_once_a_text
from bge_accel.models.encoder import load_encoder
from bge_accel.models.flops import PEAK_TFLOPS, flops_per_token, peak_flops


def test_as_many_as_torch_counts(tiny_model: str) -> None:
    encoder = load_encoder(tiny_model)[0]
    encoder.backbone.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    batch = make_token_batch(
        [[5] * 7, [6] * 7, [7] * 7, [8] * 23], pad_token_id=0, max_tokens=10_000, overhead_tokens=0
    )
    assert batch.num_padding == 0 and (batch.num_tokens, batch.num_token_pairs) == (44, 3 * 49 + 23**2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for micro_batch in batch.micro_batches:
            encoder.backbone(**micro_batch)
    counted = sum(
        flops
        for name, of_module in counter.get_flop_counts().items()
        if name == "Global"
        for flops in of_module.values()
    )
    pooler = sum(
        flops
        for name, of_module in counter.get_flop_counts().items()
        if name.endswith(".pooler")
        for flops in of_module.values()
    )
    per_token, per_pair = flops_per_token(encoder)
    assert per_token * batch.num_tokens + per_pair * batch.num_token_pairs == pytest.approx(counted - pooler, rel=1e-6)


def test_what_is_computed_once_a_text_is_left_out(tiny_model: str) -> None:
    """Beside torch's count of the products with weights; the fused attention it does not count."""
    encoder = load_encoder(tiny_model, pooling="cls")[0]
    ids = torch.full((3, 50), 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    counts = {name: sum(of_module.values()) for name, of_module in counter.get_flop_counts().items()}
    counted = counts["Global"] - sum(count for name, count in counts.items() if name.endswith(".pooler"))
    once = 2 * sum(module.weight.numel() for module in linears_once_a_text(encoder.backbone))
    per_token, per_pair = flops_per_token(encoder)
    assert per_token * 150 + once * 3 == counted and once * 3 < 0.02 * counted
    assert per_pair == 4 * 1 * 32  # of one of the two layers


def test_no_peak_for_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_more_special_names_come_first() -> None:
    """The first name that occurs counts, so none may hide a longer one behind it."""
    names = list(PEAK_TFLOPS)
    assert not [(a, b) for place, a in enumerate(names) for b in names[place + 1 :] if a in b]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the card's peak is looked up by its name")
def test_peak_of_this_card() -> None:
    peak = peak_flops(torch.device("cuda"))
    assert peak is None or peak > 1e13


def test_the_log_has_the_rate(run_script, tmp_path: Path, tiny_model: str) -> None:
    row = {"query": "king", "pos": ["the king"], "neg": ["queen"]}
    (tmp_path / "rows.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    args = ["--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--output_dir", "out", "--max_steps", 1]
    done = run_script("finetune.py", *args, "--per_device_train_batch_size", 4, "--train_group_size", 2)
    line = json.loads((tmp_path / "out" / "train_log.jsonl").read_text().splitlines()[-1])
    assert 0 < line["tflops"] < 100 and "mfu" not in line and "TFLOP/s" in done.stdout

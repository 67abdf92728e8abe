"""Our training step beside those of FlagEmbedding and sentence-transformers: the same batches give the same weights."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.repo import REPO

PEERS = Path(os.environ.get("PEERS_PYTHON", REPO / ".venv-peers" / "bin" / "python"))
TOOLS = REPO / "scripts" / "benchmarks" / "tools.py"
STEPS, BATCH, SEED = 20, 12, 3


def write_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """Rows of one positive and one negative, so that nothing is left to draw: as we read them, and in the order of our run."""
    from bge_accel.data.examples import RowOrder

    # Each text once: what we mask, another row's positive, the others take for a negative.
    functions: dict[str, str] = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                functions[ast.unparse(node.body[1:] or node.body)] = doc.split("\n")[0]
        if len(functions) >= 2 * count:
            break
    texts = list(functions.items())
    rows = [
        {"query": query, "pos": [text], "neg": [negative]}
        for (text, query), (negative, _) in zip(texts[:count], texts[count : 2 * count], strict=True)
    ]
    order = RowOrder(count, SEED)
    paths = folder / "rows.jsonl", folder / "in_order.jsonl"
    for path, found in zip(paths, (rows, [rows[order[place][1]] for place in range(count)]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return paths


def tune(python: Path | str, tool: str, model: str, rows: Path, folder: Path, **arguments: object) -> dict:
    """The tensors of the model that a tool makes of another one."""
    from safetensors.torch import load_file

    job = {
        "task": "tune", "tool": tool, "model_name_or_path": model, "train_data": str(rows), "pooling": "mean",
        "output_dir": str(folder / tool), "result": str(folder / f"{tool}.json"), "batch_size": BATCH,
        "train_group_size": 2, "query_max_len": 48, "passage_max_len": 48, "temperature": 0.02, "precision": "fp32",
        "use_cpu": True, "mini_batch_size": None,
        "arguments": {
            "max_steps": STEPS, "learning_rate": 5e-5, "warmup_steps": 4, "lr_scheduler_type": "linear", "seed": SEED,
            "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, **arguments,
        },
    }  # fmt: skip
    done = subprocess.run([python, TOOLS, json.dumps(job)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(folder / tool / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["FlagEmbedding", "sentence-transformers"])
def test_twenty_steps_end_with_the_weights_of_other_tools(peer: str, real_model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    if not PEERS.exists():
        pytest.skip("other tools are not installed: make peers")
    sys.path.insert(0, str(TOOLS.parent))
    from bench import without_dropout  # whose masks each tool draws by itself

    model = without_dropout(real_model, tmp_path / "model")
    ours_read, theirs_read = write_rows(tmp_path, STEPS * BATCH)
    ours = tune(sys.executable, "bge_accel", model, ours_read, tmp_path)
    theirs = tune(PEERS, peer, model, theirs_read, tmp_path, train_sampling_strategy="sequential")
    before = load_file(Path(model) / "model.safetensors")
    compared = 0
    for name, start in before.items():
        # Unused, no weight, or a bias whose gradient is zero but for rounding, which Adam makes as large as any other.
        if "pooler" in name or "position_ids" in name or name.endswith("key.bias"):
            continue
        moved, apart = (theirs[name] - start).double().norm(), (ours[name] - theirs[name]).double().norm()
        assert moved > 0 and apart < 1e-2 * moved, f"{name}: moved by {moved:.3e}, {apart:.3e} apart"
        compared += 1
    assert compared > 50

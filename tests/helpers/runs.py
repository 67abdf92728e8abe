"""Rows to train on, and what a run has left."""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

WORDS = "king queen forest river castle gold apple wolf bread stone night song mother snow ring ship door star".split()


def write_rows(path: Path, count: int = 40, *, num_neg: int = 3, seed: int = 0, **extra: object) -> Path:
    """Rows whose passages share a rare word with their query, so that there is something to learn."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            phrase = " ".join(rng.choices(WORDS, k=3))
            row = {
                "query": f"who saw the {phrase} {i}?",
                "pos": [f"It was the {phrase} {i} that they saw {j}." + " and" * rng.randint(0, 20) for j in range(2)],
                "neg": [
                    f"Nobody saw {' '.join(rng.choices(WORDS, k=rng.randint(2, 12)))} {i} {j}" for j in range(num_neg)
                ],
                **extra,
            }
            file.write(json.dumps(row) + "\n")
    return path


def weights(folder: Path | str) -> dict[str, np.ndarray]:
    # The attention's key bias has a true gradient of zero, of which AdamW makes noise. (For the same reason the runs
    # that are compared have a large --adam_epsilon: a step is then proportional to its gradient.)
    return {k: v for k, v in load_file(Path(folder) / "model.safetensors").items() if not k.endswith("key.bias")}


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "train_log.jsonl")]


def assert_same_weights(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=tolerance, rtol=0, err_msg=name)

"""Runs a script as `python SCRIPT ARGS` would and notes which rows its loss has seen, batch by batch.

    SPY_ROWS=/tmp/seen python tests/helpers/spy_rows.py scripts/finetune.py ...

Writes /tmp/seen-RANK.jsonl: for each batch a list with the `text_id`s of each local query's known positives. With
STOP_AFTER=N (and STOP_RANK, all by default) a process sends itself STOP_SIGNAL (SIGTERM) during its N-th batch; with
STOP_AGAIN=SECONDS once more so much later.
"""

import json
import os
import runpy
import signal
import sys
import time

import bge_accel.training.losses

rank = os.environ.get("RANK", "0")
stop_after = int(os.environ.get("STOP_AFTER", "-1"))
number = signal.Signals[os.environ.get("STOP_SIGNAL", "SIGTERM")]
true_pairs, batches = bge_accel.training.losses.known_positive_pairs, 0


def note(known_ids, *args, **kwargs):
    global batches
    batches += 1
    if "SPY_ROWS" in os.environ:
        with open(f"{os.environ['SPY_ROWS']}-{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([[int(i) for i in ids] for ids in known_ids]) + "\n")
    if batches == stop_after and os.environ.get("STOP_RANK", rank) == rank:
        os.kill(os.getpid(), number)
        if "STOP_AGAIN" in os.environ:
            time.sleep(float(os.environ["STOP_AGAIN"]))
            os.kill(os.getpid(), number)
    return true_pairs(known_ids, *args, **kwargs)


bge_accel.training.losses.known_positive_pairs = note
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")

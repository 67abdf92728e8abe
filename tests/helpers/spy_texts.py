"""Runs a script as `python SCRIPT ARGS` would and notes the texts of each batch: $SPY_TEXTS-RANK.jsonl, queries first."""

import json
import os
import runpy
import sys

import bge_accel.models.tokenizing

true_tokenize = bge_accel.models.tokenizing.tokenize
rank = os.environ.get("RANK", "0")


def note(tokenizer, texts, max_length):
    with open(f"{os.environ['SPY_TEXTS']}-{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(list(texts)) + "\n")
    return true_tokenize(tokenizer, texts, max_length)


bge_accel.models.tokenizing.tokenize = note
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")

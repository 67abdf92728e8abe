"""Score each row's positives and negatives with a cross-encoder: teacher scores for distillation.

FlagEmbedding's documented line, with the entry point replaced:

    python scripts/score_with_reranker.py --reranker_name_or_path BAAI/bge-reranker-v2-m3 \\
        --input_file toy_finetune_data_minedHN.jsonl --output_file toy_finetune_data_score.jsonl

On several GPUs: torchrun --nproc_per_node 8 scripts/score_with_reranker.py ...

Rows come out as they were, with "pos_scores" and "neg_scores", one number a text. A run that was killed goes on with
the same command: what it has done is kept in OUTPUT_FILE.scoring until the end.
"""

import json
import shutil
from array import array
from dataclasses import dataclass

import numpy as np

from bge_accel.config import (
    Refusal,
    check_model_path,
    check_rules,
    learning_settings,
    option,
    parse_config,
    required,
    to_yaml,
    user_errors,
)
from bge_accel.data.reading import check_json, read_rows, text_id
from bge_accel.data.rows import TrainingRows
from bge_accel.encoding.reranker import SHORTEST_PAIR
from bge_accel.files.atomic import atomic_file
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_output
from bge_accel.files.parts import open_work, part_name, read_part, read_parts, what_is_kept, write_part
from bge_accel.mining.histogram import text_histogram
from bge_accel.mining.rows import new_row, rounded
from bge_accel.processes.group import Processes, leave_processes
from bge_accel.processes.progress import progress, say, warn
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments and the data have been checked.

ROWS_PER_CHUNK = 256  # scored together, and lost by a kill
ROWS_IN_HISTOGRAM = 200_000
_DECODER = Refusal("only cross-encoders are used here, not decoders", ("None", "1"))
_MINING = Refusal("it is a flag of scripts/mine_hard_negatives.py; drop it")
REFUSED = {
    "devices": Refusal("choose by CUDA_VISIBLE_DEVICES; for several start with torchrun or `accelerate launch`", ("None",)),
    "reranker_model_class": Refusal("only cross-encoders are used here", ("encoder-only-base", "auto", "None")),
    **{name: _DECODER for name in "reranker_peft_path prompt cutoff_layers compress_ratio compress_layers".split()},
    # FlagEmbedding's guide has them in this line by mistake; its own script stops at them.
    **{name: _MINING for name in "range_for_sampling negative_number use_gpu_for_searching".split()},
}  # fmt: skip


@dataclass(kw_only=True)
class Config:
    """What to score, and by which model."""

    reranker_name_or_path: str = required(
        "folder or hub name of the cross-encoder", aliases=["reranker", "model_name_or_path"], group="model"
    )
    input_file: list[str] = required(
        'files, globs or folders of rows {"query", "pos", "neg"}', group="data", affects_learning=False
    )
    output_file: str = required("where the rows are written, as JSON lines", affects_learning=False)
    cache_path: str | None = option(
        None, "where checked rows are kept; default: ~/.cache/bge_accel/rows", affects_learning=False
    )

    query_instruction_for_rerank: str | None = option(None, "put before each query", group="model")
    query_instruction_format_for_rerank: str = option("{}{}", "how it is put together with the query")
    passage_instruction_for_rerank: str | None = option(None, "put before each passage")
    passage_instruction_format_for_rerank: str = option("{}{}", "how it is put together with the passage")
    use_fp16: bool | None = option(
        None, "float16 (CPU: bfloat16 where it is faster, else float32); False: float32; default: True", aliases=["fp16"],
    )  # fmt: skip
    use_bf16: bool = option(
        False, "bfloat16 instead of float16", aliases=["bf16"], excludes={"use_fp16": "give one of them"}
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")
    cache_dir: str | None = option(None, "where models from the hub are kept", affects_learning=False)
    reranker_max_length: int = option(
        512, "tokens of a query and a passage together", at_least=SHORTEST_PAIR, aliases=["max_length"]
    )
    reranker_query_max_length: int | None = option(
        None, "tokens that a query is cut to; default: 3/4 of --reranker_max_length", at_least=1
    )
    reranker_batch_size: int | None = option(
        None, "at most so many pairs in one forward pass; default: a token budget alone decides", at_least=1,
        aliases=["batch_size"],
    )  # fmt: skip
    normalize: bool = option(False, "scores between 0 and 1, by the logistic function")


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is read."""
    check_rules(cfg)
    check_model_path("--reranker_name_or_path", cfg.reranker_name_or_path)
    faults = Faults()
    find_files(cfg.input_file, faults)
    faults.raise_if_any()
    check_output("--output_file", cfg.output_file, cfg.input_file)
    check_json(cfg.input_file, faults)
    faults.raise_if_any()


def main(cfg: Config) -> None:
    # ---- check and read everything before a model is loaded
    processes = Processes()
    work = f"{cfg.output_file}.scoring"
    with user_errors():
        check(cfg)
        processes.on_first(lambda: lock_output(cfg.output_file, is_folder=False))
        rows = TrainingRows(cfg.input_file, cache_folder=cfg.cache_path)
    num_texts = sum(len(rows.passages(i)) for i in range(len(rows)))
    processes.say(f"{len(rows):,} rows, {num_texts:,} pairs to score")

    from bge_accel.encoding.reranker import Reranker
    from bge_accel.encoding.storing import tokenizer_digest, weights_digest
    from bge_accel.models.precision import own_device, resolve_dtype
    from bge_accel.models.settings import instruction_prefix

    # ---- model
    with user_errors():
        query_prefix = instruction_prefix(cfg.query_instruction_for_rerank, cfg.query_instruction_format_for_rerank)
        passage_prefix = instruction_prefix(
            cfg.passage_instruction_for_rerank, cfg.passage_instruction_format_for_rerank
        )
        device = own_device(processes.world)
        dtype, warning = resolve_dtype(cfg.use_fp16 is not False and not cfg.use_bf16, cfg.use_bf16, device)
        if warning and (cfg.use_fp16 or cfg.use_bf16):
            warn(warning)
        processes.say(f"computing in {str(dtype).removeprefix('torch.')} on {device.type}")
        reranker = Reranker(
            cfg.reranker_name_or_path,
            device=device,
            dtype=dtype,
            max_length=cfg.reranker_max_length,
            query_max_length=cfg.reranker_query_max_length,
            batch_size=cfg.reranker_batch_size,
            normalize=cfg.normalize,
            trust_remote_code=cfg.trust_remote_code,
            cache_dir=cfg.cache_dir,
        )

    # ---- go on from what a killed run has left, if it was the same
    fingerprint = {
        "rows": rows.digest(),
        "reranker": weights_digest(reranker.model),
        "tokenizer": tokenizer_digest(reranker.tokenizer),
        "dtype": str(dtype),
        "device": device.type,
        **learning_settings(cfg),
    }
    processes.on_first(lambda: open_work(work, fingerprint, processes.say))

    # ---- score, chunk by chunk
    starts = range(0, len(rows), ROWS_PER_CHUNK)
    parts = [part_name(work, number) for number in range(len(starts))]
    own = list(zip(parts, starts, strict=True))[processes.rank :: processes.world]
    with user_errors():
        for part, start in progress(len(own), "scoring", "chunk", shown=processes.rank == 0, iterable=own):
            if read_part(part) is not None:
                continue
            chunk = [rows[i] for i in range(start, min(start + ROWS_PER_CHUNK, len(rows)))]
            scores = reranker.score(
                ((query_prefix or "") + row["query"], (passage_prefix or "") + text)
                for row in chunk
                for text in (*row["pos"], *(row.get("neg") or []))
            )
            ends = np.cumsum([len(row["pos"]) + len(row.get("neg") or []) for row in chunk])
            records = [
                {"query_id": text_id(row["query"]), "scores": rounded(some.tolist())}
                for row, some in zip(chunk, np.split(scores, ends[:-1]), strict=True)
            ]
            write_part(part, records)
    processes.wait()

    # ---- write the rows and say what was done
    if processes.rank == 0:
        with user_errors():
            say(write_output(cfg, len(rows), parts))
        shutil.rmtree(work)
    processes.wait()


def write_output(cfg: Config, num_rows: int, parts: list[str]) -> str:
    """Reads the input again, line by line, puts the scores in, and gives the summary."""
    stride = -(-num_rows // ROWS_IN_HISTOGRAM)
    pos_scores, neg_scores, above = array("f"), array("f"), 0
    faults = Faults()

    items = (item for path in find_files(cfg.input_file, faults) for item in read_rows(path, faults))
    with atomic_file(cfg.output_file) as file:
        for number, record in enumerate(read_parts(parts)):
            where, _, row = next(items, ("", 0, {}))
            if not row or text_id(row["query"]) != record["query_id"]:
                raise ValueError(
                    f"{where or cfg.input_file[-1]}: the input has changed since it was checked; run again"
                )
            count = len(row["pos"])
            positive, negative = record["scores"][:count], record["scores"][count:]
            above += bool(negative) and max(negative) > min(positive)
            if number % stride == 0:
                pos_scores.extend(positive)
                neg_scores.extend(negative)
            new = new_row(row, row.get("neg") or [], (positive, negative))
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
    with atomic_file(f"{cfg.output_file}.config.yaml") as file:
        file.write(to_yaml(cfg))
    return "\n".join(
        [
            f"{num_rows:,} rows scored; in {above:,} a negative scores over a positive",
            "",
            text_histogram(np.array(pos_scores), np.array(neg_scores)),
            "",
            f"wrote {cfg.output_file}, {cfg.output_file}.config.yaml",
        ]
    )


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0], refused=REFUSED)
    with interruptible(lambda: what_is_kept(f"{cfg.output_file}.scoring/fingerprint.json")):
        main(cfg)
    leave_processes()

"""One measurement of one tool, in a process of its own: what `bench.py` starts, in the environment of that tool.

    python scripts/benchmarks/tools.py '{"task": "train", "tool": "bge_accel", ..., "result": "result.json"}'

Writes a list of samples, each {"seconds", "check", "megabytes"}: the time of what is compared, without imports and without
what comes before it; a number that all tools have to agree on, or null; the most memory that the process, or one that it
started, has held.
"""

import json
import os
import random
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
Sample = tuple[float, float | None]  # seconds, what to agree on


def read_lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run_script(argv: list[str]) -> None:
    """Runs a script of ours in this process."""
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


# ---- training


def trainer_arguments(job: dict) -> dict[str, Any]:
    """What all three tools call by the name that it has in the Trainer of transformers."""
    return {
        "output_dir": job["output_dir"],
        "per_device_train_batch_size": job["batch_size"],
        "save_strategy": "no",
        "report_to": "none",
        # To measure time all steps and tools have to see the same loss.
        **job.get("arguments", {"max_steps": job.get("steps", 0) + 1, "learning_rate": 1e-12, "logging_steps": 1}),
    }


def common_flags(job: dict) -> list[str]:
    """What scripts/finetune.py and FlagEmbedding both take."""
    names = "model_name_or_path train_data train_group_size query_max_len passage_max_len temperature".split()
    flags = {name: job[name] for name in names} | trainer_arguments(job)
    flags |= {"sentence_pooling_method": job["pooling"], "normalize_embeddings": True}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run_training(job: dict) -> list[tuple[float, float, float]]:
    """When each step ended (seconds since the epoch), its seconds and its loss."""
    if job["tool"].startswith("bge_accel"):
        flags = job.get("flags", ["--bf16"] if job["precision"] == "bf16" else [])
        run_script([str(SCRIPTS / "finetune.py"), *common_flags(job), *flags])
        log = os.path.join(job["output_dir"], "train_log.jsonl")
        written = os.stat(log).st_mtime  # with the last step's line
        return [(written, job["batch_size"] / line["queries_per_second"], line["loss"]) for line in read_lines(log)]

    import transformers.trainer
    from transformers import TrainerCallback

    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.time())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.time())

        def on_log(self, args: object, state: object, control: object, logs: dict, **kwargs: object) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    is_bf16 = job["precision"] == "bf16"
    if job["tool"] == "FlagEmbedding":
        sys.argv = ["base", *common_flags(job), "--use_cpu", str(job["use_cpu"]), "--bf16", str(is_bf16)]
        runpy.run_module("FlagEmbedding.finetune.embedder.encoder_only.base", run_name="__main__")
    else:
        train_sentence_transformers(job, is_bf16)
    return [(end, end - start, loss) for start, end, loss in zip(times, times[1:], losses, strict=False)]


def train(job: dict) -> list[Sample]:
    """Seconds and loss of each step but the first."""
    return [(seconds, loss) for _, seconds, loss in run_training(job)[1:]]


def tune(job: dict) -> list[Sample]:
    """A training whose weights are wanted: they are saved in `output_dir`."""
    return [(sum(seconds for _, seconds, _ in run_training(job)), None)]


def first_step(job: dict) -> list[Sample]:
    """From the start of the process to the end of the first step of a run."""
    return [(run_training(job | {"steps": 0})[0][0] - job["started"], None)]


def train_sentence_transformers(job: dict, is_bf16: bool) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling
    from sentence_transformers.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    rows, size = read_lines(job["train_data"]), job["train_group_size"] - 1
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
    # The other two draw by themselves, anew in each epoch.
    rng = random.Random(job.get("arguments", {}).get("seed", 0))
    drawn = [rng.sample(row["neg"], size) for row in rows]
    columns |= {f"negative_{i}": [texts[i] for texts in drawn] for i in range(size)}
    model = SentenceTransformer(job["model_name_or_path"], device="cpu" if job["use_cpu"] else None)
    model.max_seq_length = job["passage_max_len"]
    model[1] = Pooling(model[1].embedding_dimension, pooling_mode=job["pooling"])
    scale = 1 / job["temperature"]
    loss: Any = (
        CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=job["mini_batch_size"])
        if job["mini_batch_size"]
        else MultipleNegativesRankingLoss(model, scale=scale)
    )
    arguments = SentenceTransformerTrainingArguments(**trainer_arguments(job), use_cpu=job["use_cpu"], bf16=is_bf16)
    if arguments.train_sampling_strategy == "sequential":  # which this trainer passes over
        arguments.batch_sampler = lambda dataset, batch_size, drop_last, **_: DefaultBatchSampler(
            SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last
        )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    model[0].save(job["output_dir"])


# ---- encoding, mining


def encode(job: dict) -> list[Sample]:
    """Texts of a file to embeddings; to agree on: the mean of all cosines with the mean embedding."""
    import numpy as np

    texts = [line["content"] for line in read_lines(job["corpus"])][: job["num_texts"]]
    precision, length = job["precision"], job["max_length"]
    work: Any
    if job["tool"] == "bge_accel":
        from bge_accel.encoding.embedding_model import EmbeddingModel

        dtype = {"fp32": "float32", "bf16": "bfloat16", "default": None}[precision]
        ours = EmbeddingModel(job["model_name_or_path"], **({"dtype": dtype} if dtype else {}))

        def work(texts: list[str]) -> Any:
            return ours.encode(texts, max_length=length)
    elif job["tool"] == "FlagEmbedding":
        from FlagEmbedding import FlagModel

        chosen = {} if precision == "default" else {"use_fp16": False, "use_bf16": precision == "bf16"}
        flag = FlagModel(job["model_name_or_path"], devices=[job["device"]], pooling_method="mean", **chosen)

        def work(texts: list[str]) -> Any:
            return flag.encode(texts, max_length=length, **job["batching"])
    else:
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(job["model_name_or_path"], device=job["device"])
        model.max_seq_length = length
        if precision == "bf16":
            model = model.to(torch.bfloat16)

        def work(texts: list[str]) -> Any:
            found: Any = model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **job["batching"])
            return found.float().cpu().numpy()

    work(texts[:64])
    start = time.perf_counter()
    found = np.asarray(work(texts), dtype=np.float64)
    seconds = time.perf_counter() - start
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return [(seconds, float((found @ found.mean(0)).mean()))]


def mine(job: dict) -> list[Sample]:
    """From the start of the process to rows with negatives."""
    data, folder = job["train_data"], job["output_dir"]
    os.makedirs(folder, exist_ok=True)
    if job["tool"] == "bge_accel":
        run_script(
            [
                str(SCRIPTS / "mine_hard_negatives.py"),
                *("--model_name_or_path", job["model_name_or_path"], "--input_file", data),
                *("--output_file", os.path.join(folder, "mined.jsonl"), "--range_for_sampling", "2-50"),
                *("--negative_number", "7", "--max_length", str(job["max_length"])),
            ]
        )
    elif job["tool"] == "FlagEmbedding":
        # The steps of its hn_mine script, which is not in its package: encode the pool and the queries, search a Flat
        # index for batches of 64 queries, and draw.
        import faiss
        import numpy as np
        from FlagEmbedding import FlagModel

        rows = read_lines(data)
        pool = list({text for row in rows for text in (*row["pos"], *row["neg"])})
        model = FlagModel(job["model_name_or_path"], devices=[job["device"]], pooling_method="mean")
        p_emb = np.asarray(model.encode_corpus(pool, max_length=job["max_length"]), dtype=np.float32)
        q_emb = np.asarray(
            model.encode_queries([row["query"] for row in rows], max_length=job["max_length"]), dtype=np.float32
        )
        index = faiss.IndexFlatIP(p_emb.shape[1])
        index.add(p_emb)
        with open(os.path.join(folder, "mined.jsonl"), "w", encoding="utf-8") as file:
            for first in range(0, len(rows), 64):
                _, found = index.search(q_emb[first : first + 64], 50)
                for row, places in zip(rows[first : first + 64], found, strict=True):
                    texts = [pool[i] for i in places[2:] if pool[i] not in row["pos"] and pool[i] != row["query"]]
                    file.write(json.dumps(row | {"neg": random.sample(texts, min(7, len(texts)))}) + "\n")
    else:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import mine_hard_negatives

        rows = read_lines(data)
        model = SentenceTransformer(job["model_name_or_path"], device=job["device"])
        model.max_seq_length = job["max_length"]
        columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
        mine_hard_negatives(
            Dataset.from_dict(columns),
            model,
            range_min=2,
            range_max=50,
            num_negatives=7,
            sampling_strategy="random",
            output_format="n-tuple",
            verbose=False,
        ).to_json(os.path.join(folder, "mined.jsonl"))
    return [(time.time() - job["started"], None)]


# ---- loss, search, merging


def loss(job: dict) -> list[Sample]:
    """Forward and backward pass of the loss alone; the plain way holds the matrix of scores."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    queries, passages = (
        F.normalize(torch.randn(count, job["dim"]), dim=-1).requires_grad_()
        for count in (job["queries"], job["queries"] * job["train_group_size"])
    )
    start = time.perf_counter()
    if job["tool"] == "bge_accel":
        from bge_accel.training.losses import contrastive_loss

        value = contrastive_loss(queries, passages, temperature=0.05, group_size=job["train_group_size"]).loss
    else:
        targets = torch.arange(job["queries"]) * job["train_group_size"]
        value = F.cross_entropy(queries @ passages.T / 0.05, targets)
    value.backward()
    return [(time.perf_counter() - start, value.item())]


def search(job: dict) -> list[Sample]:
    """Exact top k of random unit vectors in memory; to agree on: the mean score."""
    import numpy as np

    rng = np.random.default_rng(0)
    q_emb, p_emb = (
        rng.standard_normal((count, job["dim"]), dtype=np.float32) for count in (job["queries"], job["passages"])
    )
    if job["tool"] == "bge_accel":
        from bge_accel.evaluation.search import build_index
        from bge_accel.evaluation.search import search as search_index

        search_index(build_index(p_emb[:1000]), q_emb[:10], 10)
        start = time.perf_counter()
        scores, _ = search_index(build_index(p_emb), q_emb, job["k"])
    else:
        import faiss

        start = time.perf_counter()
        index = faiss.IndexFlatIP(job["dim"])
        index.add(p_emb)
        scores, _ = index.search(q_emb, job["k"])
    return [(time.perf_counter() - start, float(scores.mean()))]


def merge(job: dict) -> list[Sample]:
    """Half of each of two models; "plain" averages two loaded state dictionaries and saves the model."""
    import torch  # noqa: F401
    from transformers import AutoModel

    models, output = job["models"], job["output_dir"]
    if job["tool"] == "bge_accel":
        from bge_accel.merging.merge import merge_models

        start = time.perf_counter()
        merge_models(models, "encoder", [0.5, 0.5], output)
    else:
        start = time.perf_counter()
        first, second = (AutoModel.from_pretrained(model) for model in models)
        other = second.state_dict()
        average = {
            name: (tensor + other[name]) / 2 if tensor.is_floating_point() else tensor
            for name, tensor in first.state_dict().items()
        }
        first.load_state_dict(average)
        first.save_pretrained(output)
    return [(time.perf_counter() - start, None)]


# ---- start-up and resume: whole commands


def help(job: dict) -> list[Sample]:
    """A command from start to end."""
    start = time.perf_counter()
    subprocess.run(job["command"], check=True, capture_output=True)
    return [(time.perf_counter() - start, None)]


def resume(job: dict) -> list[Sample]:
    """From the start of a training until its log has a line."""
    log = Path(job["output_dir"]) / "train_log.jsonl"
    start = time.perf_counter()
    command = [*job["command"], "--output_dir", job["output_dir"]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.kill()
    if not (log.exists() and log.stat().st_size):
        raise SystemExit(f"{command} ended without a step")
    return [(seconds, None)]


def most_memory() -> float:
    """Megabytes of this process, or of the largest that it has waited for."""
    # Not this process's ru_maxrss, which begins with what its parent held.
    status = Path("/proc/self/status").read_text()
    kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return max(kilobytes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


TASKS = {
    function.__name__: function
    for function in (train, tune, first_step, encode, mine, loss, search, merge, help, resume)
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    samples = TASKS[job["task"]](job)
    megabytes = most_memory()
    lines = [{"seconds": seconds, "check": check, "megabytes": megabytes} for seconds, check in samples]
    Path(job["result"]).write_text(json.dumps(lines))

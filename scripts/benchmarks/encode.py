"""Real tokens a second of encoding, beside sentence-transformers and FlagEmbedding, in one run.

    python scripts/benchmarks/encode.py --model_name_or_path MODEL --corpus_data data/code_search/corpus.jsonl

The same texts, weights, maximum length and pooling for all; tokens are counted without padding. In turns: the tokens a
second are those of the best of --rounds, the ratios the median of the rounds' ratios. Each tool runs with its own
batching: both others sort by length and cut batches of 32 and of 256 texts, of which the better counts. "default" is
each tool as it comes: here the precision that encode_corpus.py chooses, in sentence-transformers float32, in
FlagEmbedding its default (float16; on a CPU it computes in float32 whatever it is told, under "bf16" too). The share is that of this machine's rate for large
matrix products in the same precision, measured in the same run.

sentence-transformers is in requirements-dev.txt. FlagEmbedding wants packages that encoding does not need; without them:

    pip install sentence-transformers==6.2.0 peft && pip install --no-deps FlagEmbedding==1.4.2 ir-datasets

Where other work runs on the machine, OMP_NUM_THREADS=1 compares more fairly: threads then do not wait for one another.
A tool that is not installed is left out, which the output says.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bge_accel.config import option, parse_config, required, user_errors
from bge_accel.evaluation.sets import corpus_rows
from bge_accel.files.faults import Faults


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    model_name_or_path: str = required("folder or hub name of an encoder")
    corpus_data: list[str] = required('files of passages {"content" or "text"}')
    num_texts: int = option(2000, "texts drawn at random from the corpus, in random order", at_least=1)
    max_length: int = option(256, "tokens that a text is cut to", at_least=1)
    rounds: int = option(3, "times that each is measured", at_least=1)
    precisions: list[str] = option(["fp32", "bf16", "default"], "which to measure")


def main(cfg: Config) -> None:
    import torch

    from bge_accel.encoding.embedding_model import EmbeddingModel
    from bge_accel.kernels.onednn import cpu_has_bf16
    from bge_accel.models.flops import flops_per_token, matmul_rate
    from bge_accel.models.precision import cpu_is_faster_in_bf16, default_device
    from bge_accel.models.tokenizing import tokenize

    device = default_device()
    with user_errors():
        faults = Faults()
        texts = [text for _, _, text, _ in corpus_rows(cfg.corpus_data, faults)]
        faults.raise_if_any()
        chosen = np.random.default_rng(0).permutation(len(texts))[: cfg.num_texts]
        texts = [texts[i] for i in chosen]
        if device.type == "cpu" and not cpu_has_bf16() and "bf16" in cfg.precisions:
            print("this CPU has no bfloat16 arithmetic: bf16 is left out", file=sys.stderr)
            cfg.precisions = [name for name in cfg.precisions if name != "bf16"]
        auto = "fp16" if device.type == "cuda" else "bf16" if cpu_is_faster_in_bf16() else "fp32"
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        # Without the model's instructions: only the encoding itself is compared.
        models = {
            name: EmbeddingModel(
                cfg.model_name_or_path,
                dtype=dtypes[auto if name == "default" else name],
                lengths={"--max_length": cfg.max_length},
            )
            for name in cfg.precisions
        }
    first = next(iter(models.values()))
    length = min(cfg.max_length, first.max_length)
    lengths = np.array([len(ids) for ids in tokenize(first.tokenizer, texts, length)])
    per_token, per_pair = flops_per_token(first.encoder)
    num_tokens = int(lengths.sum())
    work = per_token * num_tokens + per_pair * float((lengths.astype(np.float64) ** 2).sum())
    print(
        f"{len(texts):,} texts, {num_tokens:,} tokens (mean {lengths.mean():.0f}, at most {length}), {device}",
        flush=True,
    )

    tools: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, model in models.items():
        tools[name, "bge_accel"] = partial(model.encode, texts, max_length=length)
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        for name in models:
            other = SentenceTransformer(cfg.model_name_or_path, device=str(device))
            other.max_seq_length = length
            if name != "default":
                other = other.to(dtypes[name])
            for size in (32,) if name == "default" else (32, 256):
                tools[name, f"sentence-transformers, {size}"] = partial(
                    other.encode, texts, batch_size=size, show_progress_bar=False, convert_to_tensor=True
                )
    if importlib.util.find_spec("FlagEmbedding"):
        from FlagEmbedding import FlagModel

        for name in models:
            chosen_dtype = {} if name == "default" else {"use_fp16": False, "use_bf16": name == "bf16"}
            flag = FlagModel(
                cfg.model_name_or_path,
                devices=[str(device)],
                pooling_method=first.settings.pooling,
                normalize_embeddings=bool(first.settings.normalize),
                **chosen_dtype,
            )
            for size in (256,) if name == "default" else (32, 256):
                tools[name, f"FlagEmbedding, {size}"] = partial(flag.encode, texts, batch_size=size, max_length=length)
    for package in ("sentence_transformers", "FlagEmbedding"):
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed and left out", file=sys.stderr)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in tools}
    outputs: dict[tuple[str, str], np.ndarray] = {}
    rates: dict[str, float] = {}
    for number in range(cfg.rounds + 1):  # the first to warm up
        for key, encode in tools.items():
            start = time.perf_counter()
            found: Any = encode()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            outputs[key] = (
                found.float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float32)
            )
            if number:
                times[key].append(seconds)
        for name, model in models.items():
            rates[name] = max(rates.get(name, 0.0), matmul_rate(next(model.encoder.parameters()).dtype, device))
    for name in models:
        ours = np.array(times[name, "bge_accel"])
        reference = outputs[name, "bge_accel"]
        for (precision, tool), all_seconds in times.items():
            if precision != name:
                continue
            seconds = min(all_seconds)
            ratio = "" if tool == "bge_accel" else f"  ours is {np.median(all_seconds / ours):.2f}x as fast"
            share = (
                f"  {work / seconds / rates[name]:.0%} of {rates[name] / 1e9:,.0f} GFLOP/s"
                if tool == "bge_accel"
                else ""
            )
            norms = np.linalg.norm(outputs[precision, tool], axis=1) * np.linalg.norm(reference, axis=1)
            cosine = ((outputs[precision, tool] * reference).sum(1) / norms).min()
            print(f"{name:8}{tool:28}{num_tokens / seconds:10,.0f} tokens/s  cosine {cosine:.5f}{share}{ratio}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))

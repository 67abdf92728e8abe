"""Encode a corpus of any size into an embedding store, which evaluation and mining read in place.

    python scripts/encode_corpus.py --model_name_or_path BAAI/bge-small-en-v1.5 --corpus_data corpus.jsonl \\
        --output_dir embeddings --max_length 512

Several processes share the shards, each taking the next that is free:

    accelerate launch --multi_gpu --num_processes 8 scripts/encode_corpus.py --model_name_or_path BAAI/bge-m3 \\
        --corpus_data corpus/ --output_dir embeddings --dtype float16
    torchrun --nproc_per_node 2 scripts/encode_corpus.py ...    (on CPUs)

Stopped or killed, the same command goes on with the shards that are missing. Texts are read twice, the first time to
check every row and to note which texts these are, and never held: memory does not grow with the corpus.

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from bge_accel.config import check_model_path, option, parse_config, required, user_errors
from bge_accel.encoding.store import MANIFEST, EmbeddingStore, Manifest, digest_texts, prepare_store
from bge_accel.evaluation.set_files import files_of_beir
from bge_accel.evaluation.sets import corpus_rows, query_rows
from bge_accel.files.faults import Faults
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_folder, check_output
from bge_accel.files.parts import what_is_kept
from bge_accel.models.pooling import POOLING
from bge_accel.processes.group import SharedCounters, from_first, leave_processes
from bge_accel.processes.progress import progress, say, warn
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments have been checked.


@dataclass(kw_only=True)
class Config:
    """What to encode, with what, and where to."""

    model_name_or_path: str = required("folder or hub name of the embedding model", group="model")
    corpus_data: list[str] = required(
        'files, globs or folders of rows {"content" or "text"}, optional "title"; with --kind query {"query" or "text"}',
        group="data",
    )
    output_dir: str = required("folder of the embedding store; one begun there is gone on with", group="output")

    kind: Literal["passage", "query"] = option(
        "passage", "whether the texts are passages or queries: which instruction stands before each", group="data"
    )
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself', group="model"
    )
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself'
    )
    pooling_method: str | None = option(
        None,
        "how token states become one vector; default: what the model says of itself, else cls",
        choices=POOLING,
    )
    normalize_embeddings: bool | None = option(
        None, "scale embeddings to length 1; default: what the model says of itself, else True"
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")
    cache_dir: str | None = option(None, "where models from the hub are kept")

    max_length: int | None = option(
        None,
        "tokens that a text is cut to, special tokens included; default: the model's own",
        at_least=1,
        group="encoding",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "to compute in; auto: fp16 on a GPU, bf16 on a CPU that is faster in it, else fp32"
    )
    max_tokens_per_micro_batch: int | None = option(
        None, "padded tokens in one forward pass, halved where memory is short; default: 8192 (GPU) or 2048 (CPU)", at_least=1,
    )  # fmt: skip
    batch_size: int | None = option(None, "at most so many texts in one forward pass", at_least=1)

    dtype: Literal["float16", "float32"] = option("float32", "to store in", group="output")
    shard_size: int | None = option(
        None, "texts in a shard: what a kill can cost; default: 4,096 to 65,536, fewer for several processes", at_least=1,
    )  # fmt: skip
    disable_tqdm: bool = option(False, "no progress bar")


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is read."""
    other = "passage" if cfg.kind == "query" else "query"
    if getattr(cfg, f"{other}_instruction_for_retrieval") is not None:
        raise ValueError(f"--{other}_instruction_for_retrieval has no effect with --kind {cfg.kind}; drop it")
    check_model_path("--model_name_or_path", cfg.model_name_or_path)
    check_folder("--output_dir", cfg.output_dir)
    check_output("--output_dir", os.path.join(cfg.output_dir, MANIFEST), files_of_beir(cfg.corpus_data))


def read_texts(cfg: Config, faults: Faults) -> Iterator[str]:
    """The texts to encode, one at a time, in the order of the files."""
    if cfg.kind == "query":
        yield from (query for _, _, query in query_rows(cfg.corpus_data, faults))
    else:
        yield from (text for _, _, text, _ in corpus_rows(cfg.corpus_data, faults))


class ForwardReader:
    """Texts by number from an iterator that only goes forward; what is passed over is not kept."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.texts, self.position = texts, 0

    def __call__(self, start: int, stop: int) -> list[str]:
        """Texts `start` to `stop`; each call has to start where the last one stopped, or after."""
        assert start >= self.position
        for _ in islice(self.texts, start - self.position):
            pass
        found = list(islice(self.texts, stop - start))
        if len(found) < stop - start:
            raise ValueError("the files hold fewer texts than a moment ago: they must not change while they are read")
        self.position = stop
        return found


def main(cfg: Config) -> None:
    with user_errors():
        check(cfg)

    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from bge_accel.encoding.embedding_model import EmbeddingModel, line_for_all_gpus
    from bge_accel.encoding.pipeline import EncodingCounts
    from bge_accel.encoding.storing import encode_to_store

    # The others wait while the first reads all texts.
    on_cpu = not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, **({"timeout": timedelta(days=7)} if "RANK" in os.environ else {}))
    wanted_processes = int(os.environ.get("WORLD_SIZE", "1"))
    assert state.num_processes == wanted_processes, f"{state.num_processes} of {wanted_processes} processes connected"
    line = line_for_all_gpus()
    if line is not None:
        say(line)

    # ---- read and check all texts once, on the first process
    def read_all() -> tuple[int, str]:
        lock_output(cfg.output_dir)
        faults = Faults()
        found = digest_texts(read_texts(cfg, faults))
        faults.raise_if_any()
        say(f"{found[0]:,} texts")
        return found

    with user_errors():
        count, digest = from_first(read_all)

    # ---- model
    with user_errors():
        precision = precision_of(cfg.precision, on_cpu=on_cpu)
        model = EmbeddingModel(
            cfg.model_name_or_path,
            device=state.device,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
            pooling=cfg.pooling_method,
            normalize=cfg.normalize_embeddings,
            query_instruction=cfg.query_instruction_for_retrieval,
            passage_instruction=cfg.passage_instruction_for_retrieval,
            lengths={"--max_length": cfg.max_length},
            cut_by={cfg.kind: "--max_length"},
            trust_remote_code=cfg.trust_remote_code,
            cache_dir=cfg.cache_dir,
        )

    # ---- begin the store, or see what is missing of it
    def begin() -> tuple[Manifest, list[int]]:
        wanted = model.describe_store(
            count,
            digest,
            kind=cfg.kind,
            max_length=cfg.max_length,
            dtype=cfg.dtype,
            processes=state.num_processes,
            shard_size=cfg.shard_size,
        )
        return prepare_store(cfg.output_dir, wanted)

    with user_errors():
        manifest, missing = from_first(begin)
    length = manifest.settings["max_length"]
    if cfg.max_length is not None and length < cfg.max_length:
        warn(f"--max_length is {cfg.max_length}, but the model takes {length} tokens: texts are cut there")
    num_missing = sum(stop - start for start, stop in map(manifest.rows_of, missing))
    if state.is_main_process and num_missing < count:
        say(f"{count - num_missing:,} texts are in {cfg.output_dir} already")

    # ---- encode
    counters, counts = SharedCounters("encode_corpus", state.num_processes > 1), EncodingCounts()

    started = time.perf_counter()
    with progress(num_missing, "encoding", "text", shown=state.is_main_process and not cfg.disable_tqdm) as bar:

        def on_texts(num_texts: int) -> None:
            done = counters.add("encoded", num_texts)  # by all processes together
            bar.update(done - bar.n)

        with user_errors(by_all=True):
            encode_to_store(
                model,
                cfg.output_dir,
                manifest,
                counters.share(missing),
                ForwardReader(read_texts(cfg, Faults())),
                max_tokens=cfg.max_tokens_per_micro_batch,
                max_texts=cfg.batch_size,
                counts=counts,
                on_texts=on_texts,
            )
    own_seconds = time.perf_counter() - started
    state.wait_for_everyone()
    seconds = time.perf_counter() - started

    # ---- report
    all_counts = gather_object([(counts.num_texts, counts.num_tokens, counts.num_truncated, own_seconds)])
    if state.is_main_process:
        with user_errors():
            EmbeddingStore(cfg.output_dir)
        texts, tokens, truncated = (sum(numbers) for numbers in list(zip(*all_counts, strict=True))[:3])
        say(
            f"encoded {texts:,} texts, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s "
            f"in {precision} on {state.device.type}; "
            f"{truncated:,} texts were longer than {manifest.settings['max_length']} tokens and were cut"
        )
        if state.num_processes > 1:
            shares = ", ".join(f"{numbers[0]:,} in {numbers[3]:.1f} s" for numbers in all_counts)
            say(f"texts of each process: {shares}")
        say(f"wrote {cfg.output_dir}: {manifest.num_texts:,} x {manifest.dim} {manifest.dtype}")


def precision_of(asked: str, *, on_cpu: bool) -> str:
    """The precision to compute in; "auto" is the fast one. ValueError where the device has none such."""
    from bge_accel.kernels.onednn import cpu_has_bf16
    from bge_accel.models.precision import cpu_is_faster_in_bf16

    if asked == "auto":
        return "fp16" if not on_cpu else "bf16" if cpu_is_faster_in_bf16() else "fp32"
    if asked == "fp16" and on_cpu:
        raise ValueError("--precision fp16 needs a GPU; on a CPU there are bf16 and fp32")
    if asked == "bf16" and on_cpu and not cpu_is_faster_in_bf16():
        how = "is slower in bfloat16 than in float32" if cpu_has_bf16() else "has to emulate bfloat16"
        warn(f"this CPU {how}: --precision fp32 is faster")
    return asked


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0])
    with interruptible(lambda: what_is_kept(f"{cfg.output_dir}/manifest.json")):
        main(cfg)
    leave_processes()

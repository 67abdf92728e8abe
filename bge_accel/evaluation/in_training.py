"""Retrieval measured while a model trains: all processes encode together, with the model as it stands."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bge_accel.data.reading import text_id
from bge_accel.data.rows import TrainingRows
from bge_accel.evaluation.retrieval import choose_cutoffs, evaluate_embeddings
from bge_accel.evaluation.sets import Corpus, EvaluationData, Judgements, Queries, read_evaluation_data
from bge_accel.processes.group import from_first, rank_and_world

if TYPE_CHECKING:
    import torch

    from bge_accel.training.engine import Engine
    from bge_accel.training.log import TrainLog
    from bge_accel.training.run_folder import Checkpoint, RunFolder

# torch is imported where it is used: data are checked, and --help answers, without it.

DEPTH = 100  # passages retrieved for each query
WINDOW = 4096  # texts of a process that are sorted by length together


class EncodingSettings(NamedTuple):
    """How texts become embeddings in training, and so in evaluation."""

    query_prefix: str
    passage_prefix: str
    query_max_len: int
    passage_max_len: int
    max_tokens: int
    """Padded tokens of a micro-batch."""


def evaluate_in_training(
    model: "torch.nn.Module",
    tokenizer: Any,
    data: EvaluationData,
    settings: EncodingSettings,
    *,
    device: "torch.device",
) -> dict[str, float]:
    """Metrics of the model in training, the same on every process; called by all of them.

    Neither weights nor random generators are touched, so a run goes on as if it had not been measured.

    Args:
        model: as `accelerator.prepare` gives it: on one process, under DDP, FSDP or DeepSpeed.
    """
    import torch

    was_training = model.training
    model.eval()
    common: dict[str, Any] = {"device": device, "max_tokens": settings.max_tokens}
    with torch.no_grad():
        q_emb = encode_together(
            model, tokenizer, data.queries.texts, settings.query_prefix, settings.query_max_len, **common
        )
        p_emb = encode_together(
            model, tokenizer, data.corpus.texts, settings.passage_prefix, settings.passage_max_len, **common
        )
    model.train(was_training)
    return from_first(lambda: evaluate_embeddings(q_emb, p_emb, data, k=DEPTH).metrics)


def encode_together(
    model: "torch.nn.Module",
    tokenizer: Any,
    texts: Sequence[str],
    prefix: str,
    max_length: int,
    *,
    device: "torch.device",
    max_tokens: int,
) -> np.ndarray:
    """Embeddings (len(texts), dim) float32 of which every process computes every W-th; each gets all.

    Every process makes equally many forward passes, as FSDP and ZeRO-3 gather weights in each.
    """
    import torch

    from bge_accel.encoding.batching import make_token_batch, split_micro_batches
    from bge_accel.encoding.transfer import encoder_inputs, to_device
    from bge_accel.models.tokenizing import tokenize
    from bge_accel.training.gather import gather, largest

    rank, world = rank_and_world()
    num_own = -(-len(texts) // world)
    own = [texts[min(rank + i * world, len(texts) - 1)] for i in range(num_own)]  # the last one makes up the number
    parts = []
    for start in range(0, num_own, WINDOW):
        token_ids = tokenize(tokenizer, [prefix + text for text in own[start : start + WINDOW]], max_length)
        batch = make_token_batch(
            token_ids,
            pad_token_id=tokenizer.pad_token_id,
            max_tokens=max_tokens,
        )
        batch = split_micro_batches(batch, largest(len(batch.micro_batches), device))
        embedded = [model(**encoder_inputs(micro_batch, device)).float() for micro_batch in batch.micro_batches]
        local = torch.cat(embedded)[to_device(batch.restore, device)]
        whole = gather(local).view(world, len(local), -1).transpose(0, 1)
        parts.append(whole.reshape(-1, local.shape[1]).cpu().numpy())
    return np.concatenate(parts)[: len(texts)]


class Best:
    """The best value of a metric so far, and how many measurements ago it was.

    Args:
        metric: a metric's name like `nDCG@10`, in any case; the mean over the data sets. `NAME/nDCG@10` is that of one.
        names: of the data sets.

    Raises:
        ValueError: there is no such metric, or no such data set.
    """

    def __init__(self, metric: str, names: Sequence[str]) -> None:
        name, _, wanted = metric.rpartition("/")
        kinds = ("MRR", "nDCG", "Recall", "Capped_Recall", "MAP", "P")
        known = {f"{kind}@{at}".lower(): f"{kind}@{at}" for kind in kinds for at in choose_cutoffs(DEPTH)}
        if wanted.lower() not in known:
            raise ValueError(f"--metric_for_best_model {metric} is not one of {', '.join(known.values())}")
        if name and name not in names:
            raise ValueError(f"--metric_for_best_model {metric}: --eval_data has no {name!r}, but {', '.join(names)}")
        self.names, self.metric = [name] if name else list(names), known[wanted.lower()]
        self.forget()

    def forget(self) -> None:
        """As if nothing had been measured yet."""
        self.value: float | None = None
        self.step, self.last_step, self.waited = 0, -1, 0

    def update(self, step: int, metrics: dict[str, dict[str, float]]) -> bool:
        """Takes in the metrics of each data set after a step; whether they are the best so far."""
        value, self.last_step = float(np.mean([metrics[name][self.metric] for name in self.names])), step
        if self.value is not None and value <= self.value:
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("value", "step", "last_step", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


def read_eval_sets(paths: Sequence[str]) -> dict[str, EvaluationData]:
    """What to measure on, under the last part of each path (numbered where two are the same).

    A folder is read as BEIR's layout; anything else as rows `{"query", "pos", "neg"}`, whose queries have to find their
    positives among all passages of the rows.

    Raises:
        ValueError: anything is wrong with any row of any file.
    """
    names = [os.path.basename(os.path.normpath(path)).partition(".")[0] for path in paths]
    names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return {
        name: read_evaluation_data([path]) if os.path.isdir(path) else data_of_rows(path)
        for name, path in zip(names, paths, strict=True)
    }


def data_of_rows(path: str) -> EvaluationData:
    """Rows of a file as something to measure on; see `retrieval_from_rows`."""
    rows = TrainingRows([path])
    return retrieval_from_rows((rows.place(number), rows[number]) for number in range(len(rows)))


def retrieval_from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> EvaluationData:
    """Rows `{"query", "pos", "neg"}` as something to measure on: all passages are the corpus, equal queries are one.

    Args:
        rows: each with its place, for messages.

    Raises:
        ValueError: a row has a "prompt" of its own, which evaluation does not know.
    """
    passages: dict[int, int] = {}
    texts, queries, pairs = list[str](), dict[str, int](), set[tuple[int, int]]()
    for place, row in rows:
        if row.get("prompt"):
            raise ValueError(f'{place}: "prompt" is not known to evaluation; drop it from the rows to evaluate on')
        for text in (*row["pos"], *(row.get("neg") or [])):
            if passages.setdefault(text_id(text), len(texts)) == len(texts):
                texts.append(text)
        query = queries.setdefault(row["query"], len(queries))
        pairs.update((query, passages[text_id(text)]) for text in row["pos"])
    judged = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return EvaluationData(
        Corpus([str(i) for i in range(len(texts))], texts, texts),
        Queries([str(i) for i in range(len(queries))], list(queries), [[] for _ in queries]),
        Judgements(judged[:, 0], judged[:, 1], np.ones(len(judged), dtype=np.int64)),
        {"corpus": len(texts), "queries": len(queries), "judged_queries": len(queries), "positives": len(judged)},
        [],
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """When to measure, and what for; each named as the flag of scripts/finetune.py."""

    eval_steps: int
    eval_on_start: bool
    load_best_model_at_end: bool
    early_stopping_patience: int | None
    torch_compile: bool


class Evaluations:
    """Retrieval on held-out data while a model trains: when, how well, and whether it is the best so far.

    Args:
        best: decides what is best; None where there is nothing to measure.
        sets: what to measure on, by name.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        best: "Best | None",
        sets: Mapping[str, EvaluationData],
        engine: "Engine",
        log: "TrainLog",
        folder: "RunFolder",
        *,
        tokenizer: Any,
        encoding: EncodingSettings,
    ) -> None:
        self.options, self.best, self.sets = options, best, sets
        self.engine, self.log, self.folder = engine, log, folder
        self.tokenizer, self.encoding = tokenizer, encoding

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are kept, for the end of the run."""
        return self.options.load_best_model_at_end and self.best is not None

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Queries and passages of each set."""
        return {name: (len(data.queries.ids), len(data.corpus.ids)) for name, data in self.sets.items()}

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        return self.best.state_dict() if self.best is not None else None

    def restore(self, start: "Checkpoint") -> None:
        """Goes on from a checkpoint. Where the best weights are gone, what is best is decided anew."""
        best, state = self.best, start.state["best"]
        if best is None or state is None:
            return
        best.load_state_dict(state)
        if best.value is not None and self.keeps_best and not self.folder.keep_best(best.step, start):
            self.engine.say(
                f"warning: the best {best.metric} so far was {best.value:.4f}, but the weights of step {best.step} are "
                "not there any more; what is best is decided among the measurements from here on"
            )
            best.forget()

    def has_measured(self, step: int) -> bool:
        """Whether nothing is left to measure after a step."""
        return self.best is None or self.best.last_step == step

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure after a step, or before the first."""
        due = step % self.options.eval_steps == 0 if step else self.options.eval_on_start
        return due and not self.has_measured(step)

    def measure(self, step: int) -> bool:
        """Measures on each set, by all processes, into the log; whether the run's patience is at its end."""
        import torch

        from bge_accel.training.saved_model import BEST

        best, say, num_steps = self.best, self.engine.say, self.log.num_steps
        assert best is not None
        started = time.perf_counter()
        # Compiled, the layers would be compiled anew for what encoding does to them.
        with torch.compiler.set_stance("force_eager") if self.options.torch_compile else nullcontext():
            metrics = {
                name: evaluate_in_training(
                    self.engine.model, self.tokenizer, data, self.encoding, device=self.engine.device
                )
                for name, data in self.sets.items()
            }
        seconds = time.perf_counter() - started
        is_best = best.update(step, metrics)
        shown = "  ".join(f"{name} {values[best.metric]:.4f}" for name, values in metrics.items())
        say(f"step {step}/{num_steps}  {best.metric}: {shown}{'  (best so far)' if is_best else ''}  {seconds:.1f} s")
        self.log.write_measurement(step, metrics, seconds)
        if is_best and self.keeps_best:
            self.folder.save_model(step, BEST)
        self.log.leave_out(time.perf_counter() - started)
        patience = self.options.early_stopping_patience
        if patience is None or best.waited < patience or step == num_steps:
            return False
        say(f"stopping early: {best.waited} measurements in a row were not better than that of step {best.step}")
        return True

"""The project's retrieval metrics as an `evaluate.Metric`, which `evaluate.load("bge_accel/evaluation/retrieval_metric")` loads.

Also in a program that has only installed the package:

    import evaluate
    from bge_accel.evaluation.metrics import metric_folder

    metric = evaluate.load(metric_folder())
"""

import datasets
import evaluate
import numpy as np

from bge_accel.evaluation.metrics import retrieval_metrics

_DESCRIPTION = "MRR, nDCG, Recall, Capped_Recall, MAP and P at any cut-offs, as trec_eval computes them."

_INPUTS = """
Args:
    predictions: for each query the ids of the retrieved passages, best first.
    references: for each query its judged passages, [{"id": str, "grade": int}, ...]; a grade of 1 or more is relevant.
    cutoffs: ranks to measure at; by default 1, 10 and 100.
Returns:
    {"MRR@1": ..., "MRR@10": ..., "nDCG@10": ..., ...}, means over the queries.
"""

_CITATION = """@inproceedings{vangysel2018pytreceval,
  title = {Pytrec_eval: An Extremely Fast Python Interface to trec_eval},
  author = {Van Gysel, Christophe and de Rijke, Maarten}, booktitle = {SIGIR}, year = {2018}
}"""


class RetrievalMetric(evaluate.Metric):
    """See `_DESCRIPTION` and `_INPUTS`, which `evaluate` shows."""

    def _info(self) -> evaluate.MetricInfo:
        judged = {"id": datasets.Value("string"), "grade": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("string")), "references": datasets.List(judged)}
            ),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[list[dict]],
        cutoffs: tuple[int, ...] = (1, 10, 100),
    ) -> dict[str, float]:
        grades = [{judged["id"]: judged["grade"] for judged in row} for row in references]
        gains = np.zeros((len(predictions), max(map(len, predictions), default=0)), dtype=np.int64)
        judged = np.zeros((len(grades), max(map(len, grades), default=0)), dtype=np.int64)
        for query, (ranking, of) in enumerate(zip(predictions, grades, strict=True)):
            if len(set(ranking)) < len(ranking):
                raise ValueError(f"predictions[{query}] names a passage twice: every id may stand in a ranking once")
            gains[query, : len(ranking)] = [of.get(passage, 0) for passage in ranking]
            judged[query, : len(of)] = sorted(of.values(), reverse=True)
        return retrieval_metrics(gains, judged, cutoffs)

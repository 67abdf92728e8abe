"""How positives' and negatives' scores lie, as text and as a figure."""

import numpy as np


def text_histogram(pos_scores: np.ndarray, neg_scores: np.ndarray, *, num_bins: int = 16, width: int = 28) -> str:
    """Two histograms side by side, of positives' and negatives' scores over the same bins."""
    edges = score_bins(pos_scores, neg_scores, num_bins)
    counts = [np.histogram(scores, edges)[0] for scores in (pos_scores, neg_scores)]
    decimals = max(0, 1 - int(np.floor(np.log10(edges[1] - edges[0]))))
    shown = [f"{edge:.{decimals}f}" for edge in edges]
    wide = max(map(len, shown))
    lines = [f"{'score':>{2 * wide + 4}}  {'positives':<{width + 9}}  negatives"]
    for number, row in enumerate(zip(*counts, strict=True)):
        bars = [
            f"{'#' * int(np.ceil(width * count / max(1, column.max()))):<{width}} {count:>8,}"
            for count, column in zip(row, counts, strict=True)
        ]
        lines.append(f"{shown[number]:>{wide}} .. {shown[number + 1]:>{wide}}  {bars[0]}  {bars[1]}")
    for name, scores in (("positives", pos_scores), ("negatives", neg_scores)):
        if len(scores):
            low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
            lines.append(f"{name}: mean {scores.mean():.4f}, 5 % {low:.4f}, median {middle:.4f}, 95 % {high:.4f}")
    return "\n".join(lines)


def score_bins(pos_scores: np.ndarray, neg_scores: np.ndarray, num_bins: int) -> np.ndarray:
    """Edges (num_bins + 1,) of equal bins that hold all scores."""
    both = np.concatenate([pos_scores, neg_scores])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1e-3, num_bins + 1)


def plot_histogram(path: str, pos_scores: np.ndarray, neg_scores: np.ndarray) -> None:
    """Writes the two histograms as a PNG; matplotlib has to be installed."""
    from matplotlib.figure import Figure

    edges = score_bins(pos_scores, neg_scores, 50)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scores, label in ((pos_scores, "positives"), (neg_scores, "negatives")):
        if len(scores):
            weights = np.full(len(scores), 1 / len(scores))
            axes.hist(scores, edges, weights=weights, alpha=0.6, label=f"{label} ({len(scores):,})")
    axes.set_xlabel("score")
    axes.set_ylabel("share")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)

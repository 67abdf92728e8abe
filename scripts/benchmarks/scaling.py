"""What a training step costs on many GPUs, on paper: computing, the gradients, the gathered embeddings, the loss.

    python scripts/benchmarks/scaling.py
    python scripts/benchmarks/scaling.py --model base --queries 256 --group_size 8 --gpus 1 8 64 512

Nothing is measured here: the rates are options, whose defaults are an H100's data sheet with the shares of it that large
matrix products and collectives usually reach. Put in what `bench.py` or your cluster's own tests show.
"""

from dataclasses import dataclass
from typing import Literal

from bge_accel.config import option, parse_config

# Layers, hidden size, parameters (with the embeddings of their vocabulary).
MODELS = {"small": (12, 384, 33e6), "base": (12, 768, 109e6), "large": (24, 1024, 335e6), "m3": (24, 1024, 568e6)}


@dataclass(kw_only=True)
class Config:
    """The step and the cluster."""

    model: Literal["small", "base", "large", "m3"] = option("base", "shape of bge-small, -base, -large or bge-m3")
    queries: int = option(128, "queries on each GPU", at_least=1)
    group_size: int = option(8, "passages per query", at_least=1)
    query_tokens: int = option(16, "mean length of a query", at_least=1)
    passage_tokens: int = option(160, "mean length of a passage", at_least=1)
    gpus: list[int] = option([1, 8, 64, 512], "in all; 8 in a machine", at_least=1)
    tflops: float = option(
        400, "1e12 operations a second of the encoder in bfloat16 on one GPU: 40 % of an H100's peak", above=0
    )
    loss_tflops: float = option(45, "the same of float32 products, in which the loss is computed", above=0)
    nvlink: float = option(300, "GB/s of a collective for each GPU within a machine", above=0)
    network: float = option(40, "GB/s of a collective for each GPU between machines (400 Gbit/s a GPU)", above=0)
    latency: float = option(30, "microseconds of a collective, for each doubling of the GPUs", at_least=0)


@dataclass
class Step:
    """Milliseconds of the parts of one step, and what crosses the network."""

    encoder: float
    gradients: float
    gather: float
    loss: float
    gathered_megabytes: float
    """Embeddings that one GPU receives, and again as gradients."""

    @property
    def total(self) -> float:
        """The gradients travel while the backward pass, two thirds of the encoder's time, goes on."""
        return self.encoder + max(0.0, self.gradients - self.encoder * 2 / 3) + self.gather + self.loss

    @property
    def efficiency(self) -> float:
        """The encoder's share of the step."""
        return self.encoder / self.total


def step_cost(cfg: Config, gpus: int) -> Step:
    """One step with negatives from all GPUs."""
    layers, hidden, parameters = MODELS[cfg.model]
    passages = cfg.queries * cfg.group_size
    tokens = cfg.queries * cfg.query_tokens + passages * cfg.passage_tokens
    pairs = cfg.queries * cfg.query_tokens**2 + passages * cfg.passage_tokens**2
    # 12 weight matrices of hidden x hidden a layer, of which the last applies two to every token, as BGE models pool by CLS.
    weights = (12 * layers - 10) * hidden**2
    encoder = 3 * (2 * weights * tokens + 4 * (layers - 1) * hidden * pairs) / (cfg.tflops * 1e12)
    # Local queries against all passages: once forward; scores again and two products backward.
    loss = 8 * cfg.queries * passages * gpus * hidden / (cfg.loss_tflops * 1e12)
    rate = (cfg.nvlink if gpus <= 8 else cfg.network) * 1e9
    others = (gpus - 1) / gpus
    wait = cfg.latency * 1e-6 * (gpus - 1).bit_length()
    received = others * gpus * passages * hidden * 4
    # A ring: every gradient is sent twice; every embedding once forward, once as a gradient.
    gradients = 2 * others * parameters * 4 / rate + wait
    gather = 2 * (received / rate + wait)
    return Step(*(1e3 * seconds for seconds in (encoder, gradients, gather, loss)), received / 1e6)


def table(cfg: Config) -> str:
    """Markdown."""
    lines = [
        "| GPUs | negatives a query | encoder ms | gradients ms, overlapped | gathered MB | gather ms | loss ms | step ms "
        "| efficiency |",
        "| --- " * 9 + "|",
    ]
    for gpus in cfg.gpus:
        step = step_cost(cfg, gpus)
        lines.append(
            f"| {gpus} | {gpus * cfg.queries * cfg.group_size - 1:,} | {step.encoder:.0f} | {step.gradients:.1f} | "
            f"{step.gathered_megabytes:.1f} | {step.gather:.2f} | {step.loss:.2f} | {step.total:.0f} | {step.efficiency:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0])
    print(f"bge-{cfg.model}, {cfg.queries} x (1 + {cfg.group_size}) on each GPU\n\n{table(cfg)}")

"""Run by torchrun from test_training.py: the step on two processes against one process with the whole batch.

    torchrun --standalone --nproc_per_node 2 tests/helpers/distributed_step.py MODEL MODE [FOLDER]

MODE is ddp, fsdp2, zero1, zero2 or zero3; the zero ones also with "-checkpointing" (of gradients) or "-bf16".
Exits 0 where every gradient, every parameter after three steps and the saved model agree; else it fails with the case.
"""

import contextlib
import itertools
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from safetensors.torch import load_file

from bge_accel.encoding.batching import make_token_batch, split_micro_batches
from bge_accel.models.encoder import load_encoder, save_encoder
from bge_accel.processes.group import leave_processes
from bge_accel.training.gather import gather, gather_with_grad, largest
from bge_accel.training.losses import contrastive_loss, known_positive_pairs
from bge_accel.training.sharding import configure_deepspeed, deepspeed_backward, whole_state_dict
from bge_accel.training.step import ActivationBudget, embed_and_backward

QUERIES, GROUP, WORLD = 3, 2, 2  # on each process
RATE, MAX_NORM = 1e-3, 0.5
UNEVEN = -1  # one process keeps all graphs, the other one: their collectives must pair all the same


def make_batch() -> tuple[list, list, np.ndarray, list]:
    """Token ids of the global batch's queries and passages, the passages' ids, each query's known positives."""
    rng = np.random.default_rng(0)
    queries = [[2, *rng.integers(5, 60, rng.integers(2, 9)), 3] for _ in range(QUERIES * WORLD)]
    passages = [[2, *rng.integers(5, 60, rng.integers(2, 30)), 3] for _ in range(QUERIES * WORLD * GROUP)]
    ids = np.arange(len(passages))
    ids[-1] = ids[0]  # the last negative of the last process is the first query's positive
    known = [[int(ids[i * GROUP])] for i in range(len(queries))]
    known[1].append(int(ids[-3]))  # a positive that was not drawn
    return queries, passages, ids, known


def make_encoder(path: str, dtype: torch.dtype, checkpointing: bool):
    options = {"pooling": "mean", "dtype": dtype, "gradient_checkpointing": checkpointing}
    encoder, tokenizer, settings = load_encoder(path, **options)
    encoder.backbone.config.attention_probs_dropout_prob = 0.0
    for module in encoder.modules():  # dropout cannot be the same on one process and on two
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return encoder.train(), tokenizer, settings


def make_optimizer(encoder: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=RATE)


def accumulate(model, batch, *, first: int = 0, cross: bool = False, mask: bool = True, equal: bool = False, **step):
    """One step's gradients into the model; returns the loss on this process's queries."""
    queries, passages, ids, known = batch
    tokens = make_token_batch(queries + passages, pad_token_id=0, max_tokens=64, overhead_tokens=8)
    assert len(tokens.micro_batches) > 2
    if equal:
        tokens = split_micro_batches(tokens, largest(len(tokens.micro_batches), torch.device("cpu")))

    def loss_fn(emb):
        q_emb, p_emb, all_ids = emb[: len(queries)], emb[len(queries) :], torch.from_numpy(ids)
        if cross:
            p_emb, all_ids = gather_with_grad(p_emb), gather(all_ids)
        pairs = known_positive_pairs(known, all_ids.numpy(), group_size=GROUP, first_query=first)
        masked = (torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])) if mask else None
        out = contrastive_loss(q_emb, p_emb, temperature=0.1, group_size=GROUP, first_query=first, masked=masked)
        return out.loss, out.loss.detach()

    return embed_and_backward(model, tokens, loss_fn, device=torch.device("cpu"), **step)


def flat(tensors) -> torch.Tensor:
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().flatten().cpu() for t in tensors])


def compared(encoder) -> list[str]:
    """Names of the parameters that must agree after steps of AdamW.

    The gradient of the attention's key biases is zero but for rounding (they shift all scores of a query alike), and
    AdamW, which divides it by its own size, makes full steps of that noise.
    """
    return [name for name, _ in encoder.named_parameters() if not name.endswith("key.bias")]


def gradients(encoder) -> torch.Tensor:
    return flat(p.grad for p in encoder.parameters() if p.requires_grad)


def start(mode: str) -> Accelerator:
    """An Accelerator of this kind on the CPU, which needs some persuasion; on GPUs the launch configuration does it."""
    if mode == "ddp":
        return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if mode == "fsdp2":
        from accelerate import PartialState

        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        return Accelerator(fsdp_plugin=plugin)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(zero_stage=int(mode[4]), zero3_init_flag=False, zero3_save_16bit_model=True)
    return Accelerator(
        mixed_precision="bf16" if mode.endswith("bf16") else "no",
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def compare(found: torch.Tensor, expected: torch.Tensor, tolerance: float, case: str) -> None:
    difference = float((found - expected).norm() / expected.norm())
    assert difference < tolerance, f"{case}: they differ by {difference:.1e} of their norm"


def one_process(model_path: str, dtype: torch.dtype, checkpointing: bool) -> tuple[torch.Tensor, ...]:
    """Loss and gradient of the first step and the parameters after three, on one process with the whole batch."""
    batch = make_batch()
    encoder, _, _ = make_encoder(model_path, dtype, checkpointing)
    accumulate(encoder, batch, mask=False)
    unmasked = gradients(encoder)
    encoder.zero_grad()
    optimizer = make_optimizer(encoder)
    for step in range(3):
        loss = accumulate(encoder, batch)
        if step == 0:
            first_gradients, first_loss = gradients(encoder), loss
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    assert first_gradients.norm() > 2 * MAX_NORM, "nothing is clipped"
    assert (first_gradients - unmasked).norm() > 1e-3 * unmasked.norm(), "the planted positives change nothing"
    parameters = dict(encoder.named_parameters())
    return first_loss, first_gradients, flat(parameters[name] for name in compared(encoder))


def main(model_path: str, mode: str, folder: str | None = None) -> None:
    sharded = mode != "ddp"
    # A DeepSpeed process has one engine.
    cases = [
        (dtype, checkpointing)
        for dtype in ((torch.float32,) if sharded else (torch.float64, torch.float32))
        for checkpointing in ((mode.endswith("checkpointing"),) if mode.startswith("zero") else (False, True))
    ]
    # Before DeepSpeed starts: under ZeRO-3 every model that is loaded is sharded.
    references = {case: one_process(model_path, *case) for case in cases}

    accelerator = start(mode)
    rank = accelerator.process_index
    assert accelerator.num_processes == WORLD == dist.get_world_size()
    wanted = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(mode, "DEEPSPEED")
    assert accelerator.distributed_type.value == wanted, accelerator.distributed_type
    whole = make_batch()
    q, p = slice(rank * QUERIES, (rank + 1) * QUERIES), slice(rank * QUERIES * GROUP, (rank + 1) * QUERIES * GROUP)
    share = whole[0][q], whole[1][p], whole[2][p], whole[3][q]

    for (dtype, checkpointing), budget in itertools.product(cases, (0,) if sharded else (math.inf, 0, 100, UNEVEN)):
        case = f"{mode}, {dtype}, checkpointing {checkpointing}, kept tokens {budget}"
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        if mode.endswith("bf16"):  # eight bits of mantissa
            tolerance = 2e-2
        own_budget = (math.inf, 1)[rank] if budget == UNEVEN else budget
        expected_loss, expected, expected_parameters = references[dtype, checkpointing]
        encoder, tokenizer, settings = make_encoder(model_path, dtype, checkpointing)
        if mode.startswith("zero"):
            configure_deepspeed(accelerator, per_device_batch_size=QUERIES, max_grad_norm=MAX_NORM)
        model, optimizer = accelerator.prepare(encoder, make_optimizer(encoder))
        engine = accelerator.deepspeed_engine_wrapped.engine if mode.startswith("zero") else None
        for step in range(3):
            loss = accumulate(
                model,
                share,
                first=rank * QUERIES,
                cross=True,
                equal=sharded,
                activations=ActivationBudget(own_budget, bytes_per_token=1),
                no_sync=contextlib.nullcontext if sharded else lambda model=model: accelerator.no_sync(model),
                backward=deepspeed_backward(engine) if engine is not None else None,
            )
            if step == 0:
                mean = accelerator.reduce(loss.clone(), "sum") / WORLD
                assert abs(float(mean - expected_loss)) < tolerance, f"{case}: losses differ"
                if engine is not None:
                    from deepspeed.utils import safe_get_full_grad

                    found = flat(safe_get_full_grad(p) for p in encoder.parameters() if p.requires_grad)
                else:
                    found = gradients(model)
                compare(found, expected, tolerance, f"{case}, gradients")
            if engine is not None:
                engine.step()
            else:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
        weights = whole_state_dict(accelerator, model) if sharded else encoder.state_dict()
        if rank == 0:
            names = compared(encoder)
            compare(flat(weights[name] for name in names), expected_parameters, tolerance, f"{case}, parameters")
            if folder is not None and dtype == torch.float32:
                save_encoder(folder, encoder, tokenizer, settings, state_dict=weights)
                saved = load_file(os.path.join(folder, "model.safetensors"))
                assert all(tensor.dtype == torch.float32 for tensor in saved.values())
                found = flat(saved[name.removeprefix("backbone.")] for name in names)
                compare(found, expected_parameters, tolerance, f"{case}, saved model")
                assert not torch.equal(found, found.bfloat16().float()), "the half-precision copy was saved"
        accelerator.free_memory()

    # Shapes that differ are an error on every process, not a hang.
    try:
        gather_with_grad(torch.zeros(2 + rank, 4))
    except ValueError as error:
        assert "rank 0: 2 x 4" in str(error) and "rank 1: 3 x 4" in str(error), error
    else:
        raise AssertionError("unequal shapes went through")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()

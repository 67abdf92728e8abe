"""The contrastive loss against a plain double loop, its gradient against finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bge_accel.training.losses import contrastive_loss, known_positive_pairs, known_to_any

NUM_QUERIES, NUM_GROUPS = 3, 5  # five groups in the batch: three of the queries are this process's


def log_softmax(values):
    highest = max(values)
    total = math.log(sum(math.exp(value - highest) for value in values))
    return [value - highest - total for value in values]


def by_loops(q_emb, p_emb, *, temperature, group_size, first_query, in_batch_negatives, masked, teacher_scores):
    """Loss, accuracy, mean positive and mean hardest negative by Python floats (float64)."""
    queries, passages = q_emb.double().tolist(), p_emb.double().tolist()
    left_out = set() if masked is None else set(zip(*(indices.tolist() for indices in masked), strict=True))
    loss, hits, positives, hardest = 0.0, 0, [], []
    for row, query in enumerate(queries):
        target = (first_query + row) * group_size
        own = range(target, target + group_size)
        met = [
            column for column in (range(len(passages)) if in_batch_negatives else own) if (row, column) not in left_out
        ]
        similarity = [sum(a * b for a, b in zip(query, passage, strict=True)) for passage in passages]
        loss -= log_softmax([similarity[column] / temperature for column in met])[met.index(target)]
        if teacher_scores is not None:
            teacher = [math.exp(value) for value in log_softmax(teacher_scores[row].tolist())]
            student = log_softmax([similarity[column] / temperature for column in own])
            loss -= sum(t * s for t, s in zip(teacher, student, strict=True))
        negatives = [similarity[column] for column in met if column != target]
        positives.append(similarity[target])
        hits += all(similarity[target] > negative for negative in negatives)
        if negatives:
            hardest.append(max(negatives))
    mean_hardest = sum(hardest) / len(hardest) if hardest else math.nan
    return loss / len(queries), hits / len(queries), sum(positives) / len(queries), mean_hardest


CASES = [
    pytest.param(group_size, in_batch, masked, first, teacher, id=f"group{group_size}-" + "-".join(
        name for name, on in [("inbatch", in_batch), ("masked", masked), (f"first{first}", first), ("teacher", teacher)] if on
    ))
    for group_size, in_batch, masked, first, teacher in itertools.product(
        (1, 2, 4), (True, False), (False, True), (0, 2), (False, True)
    )
]  # fmt: skip
over_cases = pytest.mark.parametrize(("group_size", "in_batch", "masked", "first", "teacher"), CASES)


def make_case(group_size, in_batch, masked, first, teacher, dtype, dim=6, temperature=0.1):
    generator = torch.Generator().manual_seed(group_size)
    q_emb, p_emb = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
        for n in (NUM_QUERIES, NUM_GROUPS * group_size)
    )
    pairs = [
        (row, column)
        for row in range(NUM_QUERIES)
        for column in range(NUM_GROUPS * group_size)
        if column != (first + row) * group_size and (3 * row + column) % 4 == 0
    ]
    arguments = {
        "temperature": temperature,
        "group_size": group_size,
        "first_query": first,
        "in_batch_negatives": in_batch,
        "masked": tuple(torch.tensor(pairs).T) if masked else None,
        "teacher_scores": torch.randn(NUM_QUERIES, group_size, generator=generator, dtype=dtype) * 2
        if teacher
        else None,
    }
    return q_emb, p_emb, arguments


@over_cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_and_figures_equal_plain_loops(group_size, in_batch, masked, first, teacher, dtype, tolerance):
    q_emb, p_emb, arguments = make_case(group_size, in_batch, masked, first, teacher, dtype)
    output = contrastive_loss(q_emb, p_emb, **arguments)
    assert all(value.dtype == dtype and value.shape == () for value in output[:4])
    ours = [value.item() for value in output[:4]]
    assert output.query_losses.shape == output.query_correct.shape == (len(q_emb),)
    assert output.query_losses.mean().item() == pytest.approx(ours[0]) and not output.query_losses.requires_grad
    assert output.query_correct.double().mean().item() == pytest.approx(ours[1])
    np.testing.assert_allclose(ours, by_loops(q_emb, p_emb, **arguments), rtol=tolerance, atol=tolerance)


@over_cases
def test_gradients_equal_finite_differences(group_size, in_batch, masked, first, teacher):
    q_emb, p_emb, arguments = make_case(
        group_size, in_batch, masked, first, teacher, torch.float64, dim=3, temperature=0.5
    )
    inputs = q_emb.requires_grad_(), p_emb.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, p: contrastive_loss(q, p, **arguments).loss, inputs)


@pytest.mark.parametrize("max_scores", [1, 2, 7, 12, 44])
@pytest.mark.parametrize(
    ("group_size", "in_batch", "masked", "first", "teacher"), [case for case in CASES if case.values[1]]
)
def test_tiles_change_nothing(group_size, in_batch, masked, first, teacher, max_scores):
    q_emb, p_emb, arguments = make_case(group_size, in_batch, masked, first, teacher, torch.float64, dim=3)
    max_scores = min(max_scores, NUM_QUERIES * len(p_emb) - 1)  # so that the matrix is too large by one at least
    leaves = q_emb.requires_grad_(), p_emb.requires_grad_()
    tiled = contrastive_loss(q_emb, p_emb, **arguments, max_scores=max_scores)
    whole = contrastive_loss(q_emb, p_emb, **arguments)
    torch.testing.assert_close(tuple(tiled), tuple(whole), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert [value.requires_grad for value in tiled[:6]] == [True] + [False] * 5
    for ours, theirs in zip(*(torch.autograd.grad(out.loss * 3, leaves) for out in (tiled, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_scores", [50, 333, 5000])
def test_tiles_of_a_larger_batch_in_float32(max_scores):
    generator = torch.Generator().manual_seed(0)
    q_emb, p_emb = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (37, 160))
    pairs = torch.randperm(37 * 160, generator=generator)[:700]
    masked = pairs // 160, pairs % 160
    keep = masked[1] != (masked[0] + 3) * 4
    arguments = {"temperature": 0.02, "group_size": 4, "first_query": 3, "masked": (masked[0][keep], masked[1][keep])}
    leaves = q_emb.requires_grad_(), p_emb.requires_grad_()
    outputs = [contrastive_loss(q_emb, p_emb, **arguments, **kwargs) for kwargs in ({"max_scores": max_scores}, {})]
    torch.testing.assert_close(*(output[:4] for output in outputs), rtol=1e-6, atol=1e-6)
    # Similarities are up to 50 after the temperature, where float32 steps by 4e-6.
    torch.testing.assert_close(*(output.query_losses for output in outputs), rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(output.loss, leaves) for output in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return output


@pytest.mark.parametrize("max_scores", [500, 100_000])
def test_the_whole_matrix_is_never_held_when_it_is_too_large(max_scores):
    q_emb, p_emb = torch.randn(60, 4, requires_grad=True), torch.randn(120, 4, requires_grad=True)
    with LargestTensor() as largest:
        contrastive_loss(q_emb, p_emb, temperature=1, group_size=2, max_scores=max_scores).loss.backward()
    assert (largest.numel <= 500) == (max_scores == 500) and q_emb.grad is not None


def test_every_option_changes_the_loss():
    """Else the comparison above could pass with an option ignored by both."""
    losses = []
    for in_batch, masked, first, teacher in itertools.product((True, False), (False, True), (0, 2), (False, True)):
        q_emb, p_emb, arguments = make_case(4, in_batch, masked, first, teacher, torch.float64)
        losses.append(round(contrastive_loss(q_emb, p_emb, **arguments).loss.item(), 9))
    assert len(set(losses)) == 16


def test_slices_of_a_batch_average_to_the_whole():
    """Two processes with the passages of both: the mean of their losses and gradients is the global batch's."""
    q_emb, p_emb = torch.randn(6, 8, dtype=torch.float64), torch.randn(18, 8, dtype=torch.float64)
    leaves = q_emb.requires_grad_(), p_emb.requires_grad_()
    common = {"temperature": 0.3, "group_size": 3}
    whole = contrastive_loss(q_emb, p_emb, **common).loss
    halves = [contrastive_loss(q_emb[i : i + 3], p_emb, first_query=i, **common).loss for i in (0, 3)]
    mean = (halves[0] + halves[1]) / 2
    torch.testing.assert_close(mean, whole)
    for ours, theirs in zip(torch.autograd.grad(mean, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("max_scores", [2**24, 7])
def test_half_precision_is_computed_in_float32(dtype, in_batch, autocast, max_scores):
    q_emb, p_emb, arguments = make_case(4, in_batch, True, 2, True, dtype)
    arguments |= {"temperature": 0.02, "max_scores": max_scores}
    exact = contrastive_loss(q_emb.float(), p_emb.float(), **arguments)
    leaf = q_emb.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        output = contrastive_loss(leaf, p_emb, **arguments)
        low = (leaf @ p_emb.T).float() / 0.02
    assert [value.dtype for value in output[:4]] == [torch.float32] * 4
    assert [value.item() for value in output[:4]] == [value.item() for value in exact[:4]]
    assert not torch.equal(low, leaf.float() @ p_emb.float().T / 0.02)  # the precision does matter here
    output.loss.backward()
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all() and leaf.grad.any()


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_query_without_any_negative_costs_nothing(in_batch):
    q_emb = torch.ones(1, 4, requires_grad=True)
    output = contrastive_loss(q_emb, torch.ones(1, 4) / 4, temperature=0.02, group_size=1, in_batch_negatives=in_batch)
    output.loss.backward()
    assert output.loss.item() == 0 and output.accuracy.item() == 1 and output.positive_similarity.item() == 1
    assert output.hardest_negative_similarity.isnan() and torch.equal(q_emb.grad, torch.zeros(1, 4))


def test_queries_whose_negatives_are_all_masked_stay_out_of_the_hardest():
    q_emb, p_emb = torch.eye(2, 4), torch.tensor([[0.5, 0.2, 0, 0], [0.3, 0.4, 0, 0]])
    masked = torch.tensor([0]), torch.tensor([1])
    output = contrastive_loss(q_emb, p_emb, temperature=0.1, group_size=1, masked=masked)
    assert output.hardest_negative_similarity.item() == pytest.approx(0.2)
    assert output.accuracy.item() == 1 and output.loss.item() == pytest.approx(math.log1p(math.exp(-2)) / 2)
    everything = torch.tensor([0, 1]), torch.tensor([1, 0])
    output = contrastive_loss(q_emb, p_emb, temperature=0.1, group_size=1, masked=everything)
    assert output.loss.item() == 0 and output.hardest_negative_similarity.isnan()


def test_figures_carry_no_gradient():
    q_emb, p_emb, arguments = make_case(2, True, True, 0, True, torch.float32)
    output = contrastive_loss(q_emb.requires_grad_(), p_emb, **arguments)
    assert [value.requires_grad for value in output[:6]] == [True] + [False] * 5


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.03, 0.05, 1.0])
def test_a_tie_with_a_negative_is_no_hit(temperature):
    """As when all embeddings have collapsed to one; in one dimension similarities are exact."""
    collapsed = torch.linspace(0.9, 1, 64)
    q_emb, p_emb = torch.ones(64, 1), collapsed.repeat_interleave(2)[:, None]
    output = contrastive_loss(q_emb, p_emb, temperature=temperature, group_size=2, in_batch_negatives=False)
    assert output.accuracy.item() == 0


# ---- known positives


@pytest.mark.parametrize("seed", range(40))
def test_known_positive_pairs_equal_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    group_size, num_groups, num_queries = int(rng.choice([1, 2, 4])), 8, int(rng.integers(1, 5))
    first_query = int(rng.integers(0, num_groups - num_queries + 1))
    passage_ids = rng.integers(-6, 6, size=num_groups * group_size)  # few ids: many duplicates
    targets = (first_query + np.arange(num_queries)) * group_size
    known_ids = [
        list({int(passage_ids[target]), *rng.integers(-8, 8, size=rng.integers(0, 4)).tolist()}) for target in targets
    ]
    rows, columns = known_positive_pairs(known_ids, passage_ids, group_size=group_size, first_query=first_query)
    expected = {
        (row, column)
        for row in range(num_queries)
        for column in range(len(passage_ids))
        if passage_ids[column] in known_ids[row] and column != targets[row]
    }
    assert rows.dtype == columns.dtype == np.int64 and len(rows) == len(expected)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


def test_the_target_is_never_masked_even_if_it_stands_everywhere():
    rows, columns = known_positive_pairs([[7], [7]], np.full(8, 7), group_size=2, first_query=1)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (row, column) for row in (0, 1) for column in range(8) if column != 2 * (1 + row)
    ]
    masked = torch.from_numpy(rows), torch.from_numpy(columns)
    output = contrastive_loss(
        torch.ones(2, 3), torch.ones(8, 3), temperature=1, group_size=2, first_query=1, masked=masked
    )
    assert output.loss.item() == 0


def test_rows_of_one_query_know_what_any_of_them_knows():
    pairs = np.array([(5, 1), (6, 2), (5, 3), (5, 1), (7, 4)])
    assert known_to_any([6, 5, 5], pairs) == [[2], [1, 3], [1, 3]]


def test_nothing_known_masks_nothing():
    rows, columns = known_positive_pairs([[], [99]], np.arange(4), group_size=2)
    assert rows.shape == columns.shape == (0,) and rows.dtype == columns.dtype == np.int64
    q_emb, p_emb = torch.randn(2, 3), torch.randn(4, 3)
    masked = torch.from_numpy(rows), torch.from_numpy(columns)
    with_mask = contrastive_loss(q_emb, p_emb, temperature=1, group_size=2, masked=masked)
    assert with_mask.loss == contrastive_loss(q_emb, p_emb, temperature=1, group_size=2).loss

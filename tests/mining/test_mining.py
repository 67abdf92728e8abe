"""Negatives from ranked candidates: what is removed, the range, the filters, the draw, and a cross-encoder's scores."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_accel import EmbeddingModel
from bge_accel.encoding.reranker import Reranker
from bge_accel.evaluation.search import build_index, search
from bge_accel.files.faults import Faults
from bge_accel.mining.choice import (
    Choice,
    QueryGroups,
    Ranking,
    Target,
    choose_negatives,
    clean_ranking,
    draw,
    parse_range,
    random_texts,
    rank_targets,
    score_filters,
)
from bge_accel.mining.histogram import plot_histogram, text_histogram
from bge_accel.mining.pool import (
    KnownPositives,
    TextPool,
    normalise_text,
    overlap,
    read_pool_texts,
    sketch,
    text_key,
    text_keys,
    write_pool,
)
from bge_accel.models.tokenizing import TOKENIZING

WORDS = "king Queen forest ｒｉｖｅｒ castle gold Apple wolf bread Straße stone".split()


def make_pool(folder: Path, texts: list[str]) -> TextPool:
    write_pool(str(folder), lambda: iter(texts))
    return TextPool(str(folder))


def target(
    query: str, positives: list[str], *, known: list[str] | None = None, kept: list[str] | None = None
) -> Target:
    return Target(query, positives, KnownPositives([*positives, *(known or [])]), kept or [])


# ---- texts and pool


def test_texts_are_compared_in_a_normalised_form():
    assert normalise_text(" A\tKing\n ﬁnds  ＧＯＬＤ　") == "a king finds gold"
    assert text_key("STRASSE ½") == text_key("straße 1⁄2") != text_key("strase")
    rng = random.Random(0)
    for _ in range(500):  # what is normalised stays as it is
        text = "".join(chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0xF900, 0xFFEF)])) for _ in range(8))
        once = normalise_text(text)
        assert normalise_text(once) == once, ascii(text)


def test_overlap_of_word_pairs():
    assert overlap("the king slew the wolf", "The  King slew: the wolf!") == 1
    assert overlap("the king slew the wolf", "the wolf slew the king") == 3 / 5
    assert overlap("one", "One.") == 1 and overlap("one", "two") == 0 and overlap("?!", "?!") == 0
    assert overlap("国王住在城堡里", "国王住在城堡中") == 5 / 7
    long = " ".join(f"w{i}" for i in range(40))
    assert overlap(long, long.replace("w20", "x")) == 37 / 41 > 0.8


def test_sketches_never_hide_a_resembling_text():
    rng = random.Random(1)
    positives = [" ".join(rng.choices(WORDS, k=rng.randint(0, 40))) or "." for _ in range(30)]
    known = KnownPositives(positives)
    texts = []
    for _ in range(400):
        words = rng.choice(positives).split()
        for _ in range(rng.randint(0, 4)):
            words.insert(rng.randint(0, len(words)), rng.choice(WORDS))
        texts.append(" ".join(words))
    sketches = np.stack([sketch(text) for text in texts])
    for limit in (0.3, 0.8, 0.95):
        expected = [any(overlap(text, positive) > limit for positive in positives) for text in texts]
        assert known.resembling(texts, sketches, limit).tolist() == expected
        assert any(expected) and not all(expected)
    assert not known.resembling(texts, sketches, 1).any()


def test_pool_holds_distinct_texts_in_their_order(tmp_path):
    pool = make_pool(tmp_path / "pool", ["b", "ü 是", "b", "a", "B", "ü 是", ""])
    assert list(pool) == ["b", "ü 是", "a", "B", ""] and pool[1:3] == ["ü 是", "a"]
    assert [pool.find(text) for text in ("b", "B", "a", "x")] == [0, 3, 2, None]
    assert pool.keys[0] == pool.keys[3] == text_key("B")
    other = make_pool(tmp_path / "other", ["b", "ü 是", "a", "B", ""])
    assert other.digest() == pool.digest() != make_pool(tmp_path / "third", ["bü 是", "a", "B", ""]).digest()
    with pytest.raises(IndexError):
        pool[5]


def test_pool_rows(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"text": "one", "title": "left out"}\n{"content": "two"}\n{"text": 3}\n{"x": 1}\n{"text": " "}\n'
                    '{"text": "a", "content": "b"}\n')  # fmt: skip
    faults = Faults()
    assert list(read_pool_texts([str(path)], faults)) == ["one", "two"]
    assert [line.split(": ", 1)[0][-2:] for line in faults.shown] == [":3", ":4", ":5", ":6"]
    assert "keep one of them" in faults.shown[3] and '{"text": str}' in faults.shown[1]


def test_rows_that_ask_the_same_share_their_positives():
    class Rows(list):
        pass

    rows = Rows({"query": q, "pos": p} for q, p in [("Who?", ["a", "b"]), ("what", ["c"]), ("who? ", ["A", "d"])])
    groups = QueryGroups(rows, text_keys(row["query"] for row in rows))
    assert set(groups.known_positives(0).keys) == set(groups.known_positives(2).keys) == set(text_keys("abd"))
    assert groups.known_positives(1).keys.tolist() == [text_key("c")]


# ---- the choice


@pytest.mark.parametrize(("text", "expected"), [("2-200", (2, 200)), (" 0 - 1 ", (0, 1))])
def test_range(text, expected):
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "200", "2-", "-5", "2:5", "5-5", "9-3", "a-b", "1-2-3"])
def test_wrong_ranges(text):
    with pytest.raises(ValueError, match="range"):
        parse_range(text)


def test_what_is_removed_and_why(tmp_path):
    long = " ".join(f"w{i}" for i in range(40))
    texts = [
        "other", "The Answer", "the question", long.replace("w7", "x"), "first", "FIRST", "kept", "second", "third",
        "another answer",
    ]  # fmt: skip
    pool = make_pool(tmp_path / "pool", texts)
    wanted = target("The question", ["the  answer"], known=[long, "Another Answer"], kept=["Kept"])
    ranking = Ranking(np.arange(len(texts)), np.linspace(1, 0, len(texts), dtype=np.float32))
    places, dropped, is_whole = clean_ranking(ranking, wanted, pool, Choice(0, 10))
    assert [texts[place] for place in places] == ["other", "first", "second", "third"] and not is_whole
    assert dropped == Counter(
        {"known_positive": 2, "query": 1, "near_duplicate": 1, "duplicate": 1, "existing_negative": 1}
    )
    # What lies behind the end is not counted, and 1 turns the near-duplicates off.
    places, dropped, is_whole = clean_ranking(ranking, wanted, pool, Choice(0, 3, max_positive_overlap=1))
    assert [texts[place] for place in places][:2] == ["other", long.replace("w7", "x")] and is_whole
    assert len(places) == 3 and dropped == Counter({"known_positive": 1, "query": 1})


def test_margins_by_hand():
    scores = np.array([0.9, 0.77, 0.75, 0.3], dtype=np.float32)

    def kept(positives: list[float], **filters: float) -> list[int]:
        passed, dropped = score_filters(scores, positives, Choice(**filters))
        assert sum(dropped.values()) == 4 - passed.sum()
        return np.flatnonzero(passed).tolist()

    assert kept([0.8]) == [0, 1, 2, 3]
    assert kept([0.8], relative_margin=0.05) == [2, 3]  # 0.76
    assert kept([0.8], relative_margin=0) == [1, 2, 3]
    assert kept([0.8], absolute_margin=0.04) == [2, 3]  # 0.76
    assert kept([0.95, 0.8], absolute_margin=0.04) == [2, 3], "the lowest positive counts"
    assert kept([0.8], absolute_margin=0.49, relative_margin=0.05) == [3]
    assert kept([0.0], max_score=0.8) == [1, 2, 3] and kept([0.0], min_score=0.76) == [0, 1]
    assert kept([0.1], relative_margin=0.05) == []


def test_margins_of_negative_scores():
    """With logits below zero a margin lowers the limit, too; 95 % of -4 would raise it."""
    scores = np.array([-3.9, -4.1, -4.3], dtype=np.float32)
    passed, dropped = score_filters(scores, [-4.0], Choice(relative_margin=0.05))
    assert passed.tolist() == [False, False, True] and dropped == {"relative_margin": 2}
    assert score_filters(scores, [-4.0], Choice(absolute_margin=0.05))[0].tolist() == [False, True, True]


def test_each_filter_counts_what_the_others_left():
    scores = np.array([5, 4, 3, 2, 1], dtype=np.float32)
    choice = Choice(max_score=4.5, min_score=1.5, absolute_margin=1, relative_margin=0.5)
    passed, dropped = score_filters(scores, [4.5], choice)  # margins: 3.5, 2.25
    assert passed.tolist() == [False, False, False, True, False]
    assert dropped == {"max_score": 1, "min_score": 1, "absolute_margin": 1, "relative_margin": 1}


def test_the_draw():
    keys, scores = text_keys(map(str, range(100))), np.linspace(1, 0, 100, dtype=np.float32)
    choice = Choice(number=10)
    first = draw(keys, scores, choice, 7)
    assert len(set(first.tolist())) == 10 and (np.diff(scores[first]) < 0).all()
    assert (draw(keys, scores, choice, 7) == first).all() and set(draw(keys, scores, choice, 8)) != set(first)
    shuffled = np.random.default_rng(0).permutation(100)
    assert {keys[shuffled][i] for i in draw(keys[shuffled], scores, choice, 7)} == {keys[i] for i in first}
    without = np.delete(np.arange(100), first[0])  # the others stay
    assert set(keys[first[1:]]) < set(keys[without][draw(keys[without], scores[without], choice, 7)])
    assert draw(keys, scores[::-1], choice._replace(sampling="top"), 7).tolist() == list(range(99, 89, -1))
    assert (
        draw(keys[:3], scores[:3], choice, 7).tolist() == [0, 1, 2] and len(draw(keys[:0], scores[:0], choice, 7)) == 0
    )
    counts = np.zeros(100)
    for seed in range(2000):
        counts[draw(keys, scores, choice, seed)] += 1
    assert abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9), "a candidate is drawn too often or too rarely"


def test_random_texts_of_a_large_pool(tmp_path):
    pool = make_pool(tmp_path / "pool", [f"text {i}" for i in range(12_000)])
    wanted = target("text 5", ["text 7"])
    source = random_texts(wanted, pool, Choice(), [9])
    drawn = [next(source) for _ in range(1000)]
    assert len(set(drawn)) == 1000 and not {5, 7, 9} & set(drawn) and 0.4 < np.mean(drawn) / 12_000 < 0.6


def vary(text: str, rng: random.Random) -> str:
    """The same text to a reader, in other letters."""
    return rng.choice([text, text.upper(), text.replace(" ", "  "), f" {text}", text.title()])


@pytest.mark.parametrize("block", range(8))
def test_no_negative_is_a_positive_the_query_or_twice(tmp_path, block):
    """Random data with duplicates, repeated queries and tiny pools, against the definition written out plainly."""
    for case in range(50):
        rng = random.Random(1000 * block + case)
        base = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 12))]
        queries = [*rng.sample(base, k=min(len(base), 2)), "what is it"]
        rows = [
            {"query": vary(rng.choice(queries), rng), "pos": [vary(rng.choice(base), rng) for _ in range(rng.randint(1, 3))]}
            for _ in range(rng.randint(1, 6))
        ]  # fmt: skip
        texts = [vary(rng.choice(base), rng) for _ in range(rng.randint(1, 30))]
        pool = make_pool(tmp_path / str(case), texts)
        groups = QueryGroups(rows, text_keys(row["query"] for row in rows))  # type: ignore[arg-type]
        start = rng.choice([0, 0, 1, 3])
        choice = Choice(
            start, start + rng.choice([1, 4, 50]), rng.randint(1, 6), rng.choice(["random", "top"]), case,
            fill_random=rng.random() < 0.5, max_positive_overlap=rng.choice([0.8, 1.0]),
            max_score=rng.choice([None, 0.7]), relative_margin=rng.choice([None, 0.05]),
        )  # fmt: skip
        targets = []
        for i, row in enumerate(rows):
            known = groups.known_positives(i)
            banned = {text_key(row["query"]), *known.keys.tolist()}
            kept = [text for text in rng.sample(base, k=1) if text_key(text) not in banned]
            targets.append(Target(row["query"], row["pos"], known, kept))
        matrix = np.random.default_rng(case).random((len(rows), len(pool)), dtype=np.float32)
        matrix[:, 1:] = np.where(matrix[:, 1:] < 0.2, matrix[:, :1], matrix[:, 1:])  # ties

        pos_scores = [[rng.uniform(0.3, 1.2) for _ in row["pos"]] for row in rows]
        score = lambda offers, matrix=matrix: np.array([matrix[row, index] for row, index in offers])  # noqa: E731
        rankings, _ = rank_targets(targets, pool, choice, find_all(matrix), 2)
        empty = [[0.0] * len(one.kept) for one in targets]
        mined, _ = choose_negatives(targets, rankings, pos_scores, empty, pool, choice, score)
        for i, (row, one) in enumerate(zip(rows, mined, strict=True)):
            same = [
                p
                for other in rows
                if normalise_text(other["query"]) == normalise_text(row["query"])
                for p in other["pos"]
            ]
            known = {normalise_text(text) for text in same}
            keys = [normalise_text(pool[index]) for index in one.indices] + [normalise_text(t) for t in targets[i].kept]
            assert len(set(keys)) == len(keys) and not known & set(keys)
            assert normalise_text(row["query"]) not in keys and len(one.indices) <= choice.number
            assert one.scores == [matrix[i, index] for index in one.indices]

            clean, seen = [], {normalise_text(row["query"]), *known, *(normalise_text(t) for t in targets[i].kept)}
            for index in np.argsort(-matrix[i], kind="stable").tolist():
                text = pool[index]
                if normalise_text(text) in seen:
                    continue
                seen.add(normalise_text(text))
                if choice.max_positive_overlap == 1 or all(overlap(text, p) <= 0.8 for p in same):
                    clean.append(index)
            allowed = clean[choice.start : choice.end]
            assert rankings[i].indices.tolist() == allowed
            limits = [float("inf") if choice.max_score is None else choice.max_score]
            limits += [] if choice.relative_margin is None else [0.95 * min(pos_scores[i])]
            passing = [index for index in allowed if matrix[i, index] <= min(limits)]
            taken = one.indices[: len(one.indices) - one.num_filled]
            assert len(taken) == min(choice.number, len(passing)) and set(taken) <= set(passing)
            assert choice.sampling == "random" or taken == passing[: choice.number]
            assert all(matrix[i, index] <= min(limits) for index in one.indices)
            assert {text_key(pool[index]) for index in one.indices} <= {text_key(pool[index]) for index in clean}
            if choice.fill_random:  # nothing that could serve is left
                able = [index for index in clean if matrix[i, index] <= min(limits)]
                assert len(one.indices) == choice.number or len(one.indices) >= min(choice.number, len(able))
            else:
                assert one.num_filled == 0


def find_all(matrix: np.ndarray):
    """A search that gives what is asked for."""

    def find(which: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-matrix[which], axis=1, kind="stable")[:, :k]
        return np.take_along_axis(matrix[which], order, 1), order

    return find


def test_the_search_goes_deeper_until_the_slice_is_whole(tmp_path):
    """200 copies of a positive in other letters stand before the candidates."""
    pool = make_pool(
        tmp_path / "pool", [" " * (i % 50) + "The Answer" + " " * (i // 50) for i in range(200)] + list("abcdef")
    )
    matrix = np.linspace(1, 0, len(pool), dtype=np.float32)[None]
    asked = []

    def find(which: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(k)
        return find_all(matrix)(which, k)

    rankings, dropped = rank_targets([target("q", ["the answer"])], pool, Choice(1, 3), find, 64)
    assert [pool[i] for i in rankings[0].indices] == ["b", "c"] and len(asked) > 2 and asked[-1] <= len(pool)
    assert dropped == {"known_positive": 200, "before_range": 1}


def test_a_rows_draw_depends_on_no_other_row(tmp_path):
    pool = make_pool(tmp_path / "pool", [f"text {i}" for i in range(300)])
    matrix = np.random.default_rng(0).random((20, 300), dtype=np.float32)
    targets = [target(f"query {i}", [f"text {i}"]) for i in range(20)]
    choice = Choice(2, 200, 5, fill_random=True)

    def mine(rows: list[int]) -> list[list[int]]:
        some, part = [targets[i] for i in rows], matrix[rows]
        rankings, _ = rank_targets(some, pool, choice, find_all(part), 3)
        one = [[1.0]] * len(rows)
        return [m.indices for m in choose_negatives(some, rankings, one, [[]] * len(rows), pool, choice, None)[0]]  # type: ignore[arg-type]

    whole = mine(list(range(20)))
    assert mine(list(range(19, -1, -1))) == whole[::-1] and mine([7]) == [whole[7]]
    assert len({tuple(np.argsort(matrix[i])[::-1].tolist().index(j) for j in row) for i, row in enumerate(whole)}) == 20


def test_ranks_equal_brute_force_in_float64(tiny_model, tmp_path):
    rng = random.Random(3)
    words = "king princess story list string file value the a of in what who".split()
    texts = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(400)))
    pool = make_pool(tmp_path / "pool", texts)
    model = EmbeddingModel(tiny_model, pooling="mean")
    rows = [{"query": " ".join(rng.choices(words, k=5)), "pos": rng.sample(texts, k=2)} for _ in range(40)]
    targets = [target(row["query"], row["pos"]) for row in rows]
    q_emb, p_emb = model.encode_queries([row["query"] for row in rows]), model.encode_corpus(pool)
    index = build_index(p_emb)
    choice = Choice(2, 60, max_positive_overlap=1)
    rankings, _ = rank_targets(targets, pool, choice, lambda which, k: search(index, q_emb[which], k), 16)
    compared = 0
    exact = q_emb.astype(np.float64) @ p_emb.astype(np.float64).T
    for i, (one, ranking) in enumerate(zip(targets, rankings, strict=True)):
        banned = {text_key(one.query), *one.known.keys.tolist()}
        allowed = np.array([index for index in range(len(texts)) if text_key(texts[index]) not in banned])
        order = allowed[np.argsort(-exact[i, allowed], kind="stable")][2:60]
        assert len(ranking.indices) == 58
        np.testing.assert_allclose(exact[i, ranking.indices], exact[i, order], atol=1e-6)
        gaps = -np.diff(exact[i, order])
        for place in range(1, 57):  # where it is no tie, it is the same text
            if min(gaps[place - 1], gaps[place]) > 1e-6:
                assert ranking.indices[place] == order[place]
                compared += 1
    assert compared > 1500


# ---- cross-encoder


def test_reranker_scores_pairs_as_one_by_one(tiny_reranker):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 60))) + "." for _ in range(50)]
    pairs = [(rng.choice(texts)[:40], text) for text in texts]
    reranker = Reranker(tiny_reranker, max_length=64, batch_size=8)
    scores = reranker.score(iter(pairs))
    alone = []
    for pair in pairs:
        inputs = reranker.tokenizer(*pair, truncation="only_second", max_length=64, return_tensors="pt")
        with torch.inference_mode():
            alone.append(float(reranker.model(**inputs).logits[0, 0]))
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.std(scores) > 1e-3 and len(reranker.score([])) == 0
    normal = Reranker(tiny_reranker, max_length=64, normalize=True).score(pairs)
    np.testing.assert_allclose(normal, 1 / (1 + np.exp(-scores)), atol=1e-5)


def test_reranker_cuts_a_query_that_leaves_no_room(tiny_reranker):
    reranker = Reranker(tiny_reranker, max_length=32)
    inputs = reranker._tokenize([("x" * 100, "y" * 100), ("x", "y" * 100), ("x " * 100, "y")])
    assert [len(ids) for ids in inputs["input_ids"]] == [32, 32, 24 + 4]
    x, y = (reranker.tokenizer.convert_tokens_to_ids(token) for token in ("##x", "##y"))
    assert inputs["input_ids"][0].count(x) == 23 and inputs["input_ids"][0].count(y) == 4


def test_threads_may_score_with_one_reranker(tiny_reranker):
    """While one thread cuts texts in its way, another waits."""
    reranker = Reranker(tiny_reranker, max_length=32)
    pairs = [("who is the king", "a story of a king " * 20)]
    expected = reranker._tokenize(pairs)
    with ThreadPoolExecutor(1) as pool:
        with TOKENIZING:
            found = pool.submit(reranker._tokenize, pairs)
            with pytest.raises(TimeoutError):
                found.result(0.2)
        assert found.result() == expected


def test_models_that_are_no_rerankers(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"lack classifier\.bias, .* it is no reranker; name a cross-encoder"):
        Reranker(tiny_model)
    with pytest.raises(ValueError, match=r"the reranker .* has no config\.json, so it is no model"):
        Reranker(str(tmp_path))


# ---- what is shown


def test_histograms(tmp_path):
    pos, neg = np.array([0.9, 0.95]), np.array([0.1, 0.2, 0.3, 0.9])
    lines = text_histogram(pos, neg, num_bins=4).splitlines()
    counts = [[int(word) for word in line.split() if word.isdigit()] for line in lines[1:5]]
    assert counts == [[0, 3], [0, 0], [0, 0], [2, 1]]
    assert "positives: mean 0.9250" in lines[5] and "median 0.2500" in lines[6]
    assert "0.013" in text_histogram(np.array([0.0131]), np.array([0.0132]))
    assert text_histogram(np.array([1.0]), np.array([])).count("\n") == 17
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_histogram(str(tmp_path / "scores.png"), pos, neg)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_reranker_needs_room_for_query_and_passage():
    with pytest.raises(ValueError, match=r"^max_length is 15: a pair needs at least 16 tokens$"):
        Reranker("no-such/model", max_length=15)
    with pytest.raises(ValueError, match=r"^query_max_length is 0: it has to be at least 1$"):
        Reranker("no-such/model", query_max_length=0)

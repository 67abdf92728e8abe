"""Several sources of training rows, each with its own settings, and which of them comes when."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_accel.data.splitmix import splitmix64
from bge_accel.files.faults import Faults
from bge_accel.files.finding import EXTENSIONS, find_files
from bge_accel.files.parsing import load_yaml
from bge_accel.files.text import shorten

WINDOW = 1024  # items that are put in order together
YAML = (".yaml", ".yml")


@dataclass(kw_only=True)
class Source:
    """A set of rows and what is particular to it; None takes the run's own setting."""

    name: str
    path: list[str]
    weight: float | None = None
    """Its share of the batches (of the rows where sources are mixed), relative to the other sources' weights."""
    epochs: float | None = None
    """How often its rows are seen in the run; excludes weights."""
    query_instruction_for_retrieval: str | None = None
    passage_instruction_for_retrieval: str | None = None
    train_group_size: int | None = None
    use_inbatch_neg: bool | None = None
    per_device_train_batch_size: int | None = None


def find_sources(paths: Sequence[str], *, one_per_file: bool = False) -> list[Source]:
    """The sources that `paths` name.

    Args:
        paths: one YAML file of sources, or files, globs and folders of rows, which are one source together.
        one_per_file: every file of rows is a source of its own.

    Raises:
        ValueError: the YAML is not a list of sources, or says something that cannot be.
    """
    described = [path for path in paths if path.endswith(YAML)]
    if described and len(paths) > 1:
        raise ValueError(f"{described[0]}: a file of sources stands alone; name the other data inside it")
    if described:
        return read_sources(described[0])
    if not one_per_file:
        return [Source(name="all", path=list(paths))]
    faults = Faults()
    files = find_files(paths, faults)
    if not paths:
        faults.add("training data", "no file is named")
    for file, count in Counter(map(os.path.realpath, files)).items():
        if count > 1:
            faults.add(file, f"named {count} times, but every file is a source of its own; name it once")
    faults.raise_if_any()
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    names = [os.path.relpath(os.path.abspath(file), common) for file in files]
    stems = Counter(map(_stem, names))  # a.jsonl and a.json keep their endings
    return [
        Source(name=_stem(name) if stems[_stem(name)] == 1 else name, path=[file])
        for name, file in zip(names, files, strict=True)
    ]


def _stem(name: str) -> str:
    for extension in sorted(EXTENSIONS, key=len, reverse=True):
        name = name.removesuffix(extension)
    return name


def merge_small(sources: Sequence[Source], sizes: Sequence[int], small: int, drop: int) -> tuple[list[Source], int]:
    """Sources of fewer than `small` rows become one for each folder, and go where that has fewer than `drop` rows.

    Returns:
        The sources left, and how many rows were dropped.

    Raises:
        ValueError: none is left.
    """
    kept, together, dropped = [], {}, 0  # type: list[Source], dict[str, list[tuple[Source, int]]], int
    for source, size in zip(sources, sizes, strict=True):
        if size >= small:
            kept.append(source)
        else:
            together.setdefault(os.path.dirname(source.path[0]), []).append((source, size))
    for members in together.values():
        total = sum(size for _, size in members)
        if total < drop:
            dropped += total
            continue
        folder = os.path.dirname(members[0][0].name)
        name = f"{folder}/small files" if folder else "small files"
        kept.append(Source(name=name, path=[path for source, _ in members for path in source.path]))
    if not kept:
        raise ValueError(f"all {dropped:,} rows lie in small files and are dropped; lower --drop_threshold")
    return kept, dropped


def read_sources(path: str) -> list[Source]:
    """Sources from a YAML file: a list, or a mapping with the list under `sources`.

    Raises:
        ValueError: with the file, the source and the key that is wrong.
    """
    content = load_yaml(path)
    if isinstance(content, dict) and set(content) == {"sources"}:
        content = content["sources"]
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"{path}: expected a list of sources, each with at least `path: ...`, found {shorten(content)}"
        )
    sources = [_read_source(path, number, entry) for number, entry in enumerate(content, start=1)]
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two sources are called {twice!r}; give each a `name` of its own")
    weights = [source.weight is not None for source in sources]
    if any(weights) and not all(weights):
        raise ValueError(f"{path}: source {names[weights.index(False)]!r} has no weight; give all sources one, or none")
    both = next((source.name for source in sources if source.weight is not None and source.epochs is not None), None)
    if both is not None:
        raise ValueError(
            f"{path}: source {both!r} has a weight and epochs; they say the same thing twice, leave one out"
        )
    return sources


def _read_source(path: str, number: int, entry: Any) -> Source:
    where = f"{path}: source {number}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {shorten(entry)}: expected a mapping with at least `path: ...`")
    fields = {field.name: field for field in dataclasses.fields(Source)}
    unknown = [key for key in entry if key not in fields]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not one of {', '.join(fields)}")
    values = {key: value for key, value in entry.items() if value is not None}
    paths = values.get("path")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{where}: `path` is {shorten(paths)}: name a file, glob or folder of rows, or a list of them")
    values["path"] = paths
    values.setdefault("name", _stem(os.path.basename(os.path.normpath(paths[0]))) or paths[0])
    for key in ("weight", "epochs"):
        if key in values:
            value = values[key]
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{where}: `{key}` is {shorten(value)}: it has to be a number above 0")
    for key, most in (("train_group_size", 10_000), ("per_device_train_batch_size", 1_000_000)):  # the flags' bounds
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{where}: `{key}` is {shorten(value)}: it has to be a whole number between 1 and {most}")
    for key in ("name", "query_instruction_for_retrieval", "passage_instruction_for_retrieval"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{where}: `{key}` is {shorten(values[key])}: it has to be a string")
    if not isinstance(values.get("use_inbatch_neg", True), bool):
        raise ValueError(f"{where}: `use_inbatch_neg` is {shorten(values['use_inbatch_neg'])}: true or false")
    return Source(**values)


def source_shares(sources: Sequence[Source], amounts: Sequence[float], temperature: float = 1.0) -> np.ndarray:
    """(sources,) the share of each: by its weight, else by its amount to the power of 1 / temperature; they sum to 1.

    Args:
        amounts: how many batches (or rows) of each make up the run where nothing is weighted.
        temperature: above 1 small sources come more often than their size says (Arivazhagan et al. 2019,
            https://arxiv.org/abs/1907.05019, section 3).
    """
    weighted = [source.weight for source in sources if source.weight is not None]
    sizes = np.asarray(amounts, dtype=np.float64)
    with np.errstate(over="ignore"):
        shares = np.asarray(weighted or sizes ** (1 / temperature), dtype=np.float64)
    if not 0 < shares.sum() < np.inf:  # a temperature near 0 leaves what float64 can hold
        shares = (sizes / sizes.max()) ** (1 / temperature)
    assert len(shares) == len(sources)
    return shares / shares.sum()


class SourceSchedule:
    """The endless sequence of sources, each as often as its share says and evenly spread.

    The k-th item of source s is put at the time (k + u) / share[s], u in [0, 1) a hash of (seed, s, k); in the order of
    these times they come. So after n items of all sources there were n * share[s] of each, up to the number of sources,
    and any place can be looked up at no cost: it depends on (shares, seed, index) alone.
    """

    def __init__(self, shares: Sequence[float] | np.ndarray, seed: int) -> None:
        self.shares = np.asarray(shares, dtype=np.float64) / np.sum(shares)
        self.seed = seed
        self._first, self._order = 0, np.empty((0, 2), dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, how many of its items came before) of the item at `index`."""
        if len(self.shares) == 1:
            return 0, index
        if not self._first <= index < self._first + len(self._order):
            self._first, self._order = self._window_of(index)
        source, count = self._order[index - self._first].tolist()
        return source, count

    def _window_of(self, index: int) -> tuple[int, np.ndarray]:
        """The window that holds `index`: the index it starts at, and (source, count) of each of its items."""
        window = index // WINDOW
        before = self._counts(window * WINDOW)
        while before.sum() > index:
            window -= 1
            before = self._counts(window * WINDOW)
        after = self._counts((window + 1) * WINDOW)
        while after.sum() <= index:
            window, before, after = window + 1, after, self._counts((window + 2) * WINDOW)
        counts = [np.arange(first, end) for first, end in zip(before, after, strict=True)]
        source = np.repeat(np.arange(len(counts)), [len(count) for count in counts])
        count = np.concatenate(counts)
        times = (count + self._jitter(source, count)) / self.shares[source]
        order = np.lexsort((source, times))
        return int(before.sum()), np.stack([source[order], count[order]], axis=1)

    def _counts(self, time: int) -> np.ndarray:
        """(sources,) how many items of each lie before a time."""
        exact = self.shares * time
        whole = np.floor(exact).astype(np.int64)
        return whole + (self._jitter(np.arange(len(whole)), whole) < exact - whole)

    def _jitter(self, source: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Numbers in [0, 1) that look random, of the seed, a source and a count."""
        mixed = np.zeros(len(source), dtype=np.uint64)
        for value in (np.full(len(source), self.seed, dtype=np.uint64), source, count):
            mixed = splitmix64(mixed ^ value.astype(np.uint64))
        return (mixed >> np.uint64(11)).astype(np.float64) / 2**53

"""Where the corpus, queries and judgements of an evaluation are: files, a folder in BEIR's layout, or the hub."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bge_accel.data.reading import read_rows
from bge_accel.files.faults import Faults
from bge_accel.files.finding import EXTENSIONS, find_files

# What FlagEmbedding's eval_msmarco measures on unless told otherwise.
MSMARCO_CORPUS, MSMARCO_QUERIES, MSMARCO_SPLIT = "namespace-Pt/msmarco-corpus", "namespace-Pt/msmarco", "dev"
BEIR_SPLIT = "test"
QRELS_EXTENSIONS = (".tsv", ".txt", ".csv", ".qrels", ".gz", ".zst")


class Locations(NamedTuple):
    """What to read; each name is a file, a glob, a folder of files, or NAME[:CONFIG[:SPLIT]] on the hub."""

    corpus: list[str]
    queries: list[str]
    qrels: str | None


def locate(
    corpus_data: Sequence[str] | None, query_data: Sequence[str] | None, qrels: str | None, split: str | None = None
) -> Locations:
    """Fills in what a user has not named.

    A folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` (each also compressed) is one of BEIR, and so is
    a hub data set with the configurations "corpus" and "queries"; named as the corpus, either brings queries and
    judgements with it. Where no corpus is named it is MS MARCO's, and its queries are the default with it.

    Args:
        split: of judgements, by default "test", or of queries on the hub, by default "dev".

    Raises:
        ValueError: a BEIR folder without the split; another corpus without queries; `split` where nothing has splits.
    """
    beir = corpus_data[0] if corpus_data is not None and len(corpus_data) == 1 and query_data is None else None
    if beir is not None and is_beir_folder(beir):
        found = qrels or _folder_qrels(beir, split or BEIR_SPLIT)
        if qrels is not None and split is not None:
            raise ValueError(f"--split {split} has no effect with --qrels {qrels}; drop one of them")
        return Locations([beir], [beir], found)
    if beir is not None and is_hub_name(beir) and ":" not in beir and (on_hub := _beir_on_hub(beir, split, qrels)):
        return on_hub
    queries = [f"{MSMARCO_QUERIES}::{split or MSMARCO_SPLIT}"]
    if query_data is None and corpus_data is not None and list(corpus_data) != [MSMARCO_CORPUS]:
        absent = "".join(f"; {path} is not here" for path in corpus_data if not os.path.exists(path))
        raise ValueError(
            f"{' '.join(corpus_data)} is searched, but there are no queries: name them with --query_data, or a folder in "
            f"BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv) with --corpus_data alone{absent}"
        )
    if query_data is not None:
        bare = [name for name in query_data if is_hub_name(name) and ":" not in name]
        if split is not None and not bare:
            raise ValueError(
                f"--split {split} has no effect: neither is --corpus_data alone a folder in BEIR's layout, nor "
                "--query_data a data set on the hub"
            )
        queries = [f"{name}::{split or MSMARCO_SPLIT}" if name in bare else name for name in query_data]
    return Locations(list(corpus_data or [MSMARCO_CORPUS]), queries, qrels)


def is_beir_folder(path: str) -> bool:
    """Whether a folder holds BEIR's `corpus` and `queries` files."""
    return _member(path, "corpus") is not None and _member(path, "queries") is not None


def files_of_beir(names: Sequence[str]) -> list[str]:
    """The names, but of each folder in BEIR's layout the files of which it consists, as nothing else there is read."""
    found: list[str] = []
    for name in names:
        parts = [_member(name, part) for part in ("corpus", "queries")]
        if None not in parts:
            found += [*filter(None, parts), *glob.glob(f"{glob.escape(name)}/qrels/*")]
        else:
            found.append(name)
    return found


def is_hub_name(path: str, extensions: tuple[str, ...] = EXTENSIONS) -> bool:
    """Whether a name is NAME[:CONFIG[:SPLIT]] of a data set on the hub, and nothing that stands or should stand here."""
    from bge_accel.data.remote import HUB_NAME

    return not os.path.exists(path) and HUB_NAME.fullmatch(path) is not None and not path.endswith(extensions)


def rows_at(paths: Sequence[str], part: str, faults: Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of everything that `paths` name, in order; what cannot be read goes to `faults`.

    Args:
        part: "corpus" or "queries", to take of a folder in BEIR's layout.
    """
    for path in paths:
        if is_hub_name(path):
            yield from hub_rows(path, faults)
            continue
        member = _member(path, part) if is_beir_folder(path) else None
        for file in find_files([member or path], faults):
            for where, _, row in read_rows(file, faults):
                yield where, row


def hub_rows(name: str, faults: Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of NAME[:CONFIG[:SPLIT]], through `datasets`; it may also be a folder that holds one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repository, config, split = (*name.split(":"), "", "")[:3]
    try:
        dataset = load_dataset(repository, config or None, split=split or "train")
    except (OSError, ImportError, ValueError, RuntimeError, DatasetsError) as error:
        folder = repository.rsplit("/", 1)[-1]
        faults.add(
            name,
            f"is no file or folder here, and cannot be had from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Where there is a network, run `hf download {repository} "
            f"--repo-type dataset --local-dir {folder}`, and name the files in {folder}",
        )
        return
    number = 0
    for batch in dataset.iter(batch_size=1000):  # many times as fast as one by one
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{name}:{number}", dict(zip(batch, values, strict=True))


def _member(folder: str, name: str) -> str | None:
    """The file of this name, in whichever format, that a folder holds."""
    paths = (os.path.join(folder, name + extension) for extension in EXTENSIONS)
    return next((path for path in paths if os.path.isfile(path)), None)


def _folder_qrels(folder: str, split: str) -> str:
    for extension in (".tsv", ".tsv.gz", ".tsv.zst"):
        path = os.path.join(folder, "qrels", split + extension)
        if os.path.isfile(path):
            return path
    there = sorted(
        {os.path.basename(path).split(".tsv")[0] for path in glob.glob(f"{glob.escape(folder)}/qrels/*.tsv*")}
    )
    way_out = f"choose one of {', '.join(there)} with --split" if there else "name the judgements with --qrels"
    raise ValueError(f"{folder} has no judgements qrels/{split}.tsv: {way_out}")


def _beir_on_hub(name: str, split: str | None, qrels: str | None) -> Locations | None:
    """Where a BEIR set on the hub has its parts: judgements in "default" (mteb's) or in NAME-qrels (BEIR's own)."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetsError

    try:
        configs = get_dataset_config_names(name)
    except (OSError, ImportError, ValueError, RuntimeError, DatasetsError):
        return None  # whoever reads the rows will say so
    if not {"corpus", "queries"} <= set(configs):
        return None
    judged = f"{name}:{'default' if 'default' in configs else 'qrels'}" if {"default", "qrels"} & set(configs) else None
    judged = f"{judged or f'{name}-qrels:'}:{split or BEIR_SPLIT}"
    return Locations([f"{name}:corpus:corpus"], [f"{name}:queries:queries"], qrels or judged)

"""Files of rows wherever they are: on this machine, behind URLs, in datasets on the hub.

They are found and opened by `datasets`, but parsed here: its JSON reader guesses the types of a file's columns from the
first 10 MB, and stops at a later row whose "neg" is the first, or whose scores are the first with a fraction.
"""

import gzip
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from bge_accel.data.reading import FIELDS, begins_array, open_binary, parquet_rows, raw_lines, read_array
from bge_accel.files.faults import Faults, is_broken_file
from bge_accel.files.finding import EXTENSIONS, find_files

HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:/]*))?(?::([\w.]+))?")


def find_stream_files(
    paths: Sequence[str], revisions: Mapping[str, str]
) -> tuple[list[str], list[int | None], dict[str, str]]:
    """The files that `paths` name.

    Args:
        revisions: commits to take of datasets on the hub; of those that are not in it, the newest.

    Returns:
        Files, their bytes (None where a server does not say), and the commit of each dataset on the hub.

    Raises:
        ValueError: a path names nothing that can be read.
    """
    faults, found = Faults(), dict(revisions)
    files: list[list[str]] = []
    for path in paths:  # what is on this machine first: it is known at once
        is_url = "://" in path
        on_hub = not os.path.exists(path) and HUB_NAME.fullmatch(path) and not path.endswith(EXTENSIONS)
        if is_url and not file_name(path).endswith(EXTENSIONS):
            faults.add(path, f"unknown kind of file: the URL has to end in {', '.join(EXTENSIONS)}")
        files.append([] if is_url or on_hub else find_files([path], faults))
    if not paths:
        faults.add("training data", "no file is named")
    faults.raise_if_any()
    sizes: list[int | None] = []
    for path, inside in zip(paths, files, strict=True):
        try:
            if not inside:
                inside += _urls(path) if "://" in path else _hub_files(path, found)
            sizes += [_size(file) for file in inside]
        except (OSError, ImportError, ValueError, RuntimeError) as error:
            what = "cannot be opened" if "://" in path else "is no file or folder here, and cannot be had from the hub"
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else None  # it would be hidden by the URL
            faults.add(path, f"{what} ({type(error).__name__}): {cause or error}")
    faults.raise_if_any()
    return [file for inside in files for file in inside], sizes, found


def file_name(path: str) -> str:
    """File name of a path or URL, without what follows a question mark in the latter."""
    return os.path.basename(urlsplit(path).path if "://" in path else path)


def _urls(url: str) -> list[str]:
    if "*" not in url:
        return [url]
    from datasets.utils.file_utils import xglob

    if not (urls := sorted(xglob(url))):
        raise FileNotFoundError("no file there has such a name")
    return urls


def _hub_files(path: str, revisions: dict[str, str]) -> list[str]:
    """Files of a dataset on the hub, as URLs that name the commit, which is noted in `revisions`."""
    from datasets import load_dataset_builder

    match = HUB_NAME.fullmatch(path)
    assert match is not None
    name, config, split = match.groups(default="")
    builder = load_dataset_builder(name, config or None, revision=revisions.get(name))
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    files = splits.get(split or "train", [])
    if not files:
        raise ValueError(f"it has no files of a split {split or 'train'!r}, only of {', '.join(splits) or 'none'}")
    unknown = next((file for file in files if not file_name(file).endswith(EXTENSIONS)), None)
    if unknown is not None:
        raise ValueError(f"{unknown} is of an unknown kind; known are {', '.join(EXTENSIONS)}")
    if commit := re.search(r"@(\w{40})/", files[0]):
        revisions[name] = commit[1]
    return files


def _size(path: str) -> int | None:
    """Bytes of a file, None where a server does not say."""
    if "://" not in path:
        return os.path.getsize(path)
    from datasets import config
    from datasets.utils.file_utils import xopen

    # Patience is for servers that have answered before.
    patience, config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES, 1
    try:
        with xopen(path, "rb") as file:
            return getattr(file, "size", None)
    finally:
        config.STREAMING_OPEN_MAX_RETRIES = patience


def read_items(path: str, after: int = 0) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of a file's rows beyond line `after`.

    A line of a JSON file comes as bytes, so that what is passed over need not be parsed; what is in a JSON array or in
    Parquet comes as it is, and is counted as lines are.

    Raises:
        ValueError: the file cannot be read; for files behind URLs after many attempts.
    """
    try:
        with _open(path) as file:
            if file_name(path).endswith(".parquet"):
                yield from _read_parquet(file, after)
                return
            if begins_array(file):
                faults = Faults()
                items = list(read_array(path, file, faults))
                faults.raise_if_any()
                yield from items[after:]
                return
            for line, raw in raw_lines(file):
                if line > after:
                    yield line, raw
    except Exception as error:
        sends_no_ranges = "://" in path and isinstance(error, ValueError)
        if not is_broken_file(error) and not sends_no_ranges:
            raise
        raise ValueError(f"{path}: cannot be read: {error or type(error).__name__}") from error


def _read_parquet(file: Any, after: int) -> Iterator[tuple[int, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        columns = [name for name in table.schema_arrow.names if name in FIELDS]
        line = 0
        for batch in table.iter_batches(batch_size=1000, columns=columns):
            if line + len(batch) > after:
                rest = max(0, after - line)
                yield from enumerate(parquet_rows(batch.slice(rest)), start=line + rest + 1)
            line += len(batch)


def _open(path: str) -> Any:
    """A file for reading bytes: unpacked and with `peek`, or one that can be searched if it is Parquet."""
    if "://" not in path:
        return open_binary(path)
    from datasets.utils.file_utils import xopen

    file = xopen(path, "rb")
    name = file_name(path)
    if name.endswith(".parquet"):
        return file
    buffered = io.BufferedReader(_Raw(file), buffer_size=1 << 20)
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=buffered)
    if name.endswith(".zst"):
        from backports import zstd

        return zstd.ZstdFile(buffered)
    return buffered


class _Raw(io.RawIOBase):
    """A file of `fsspec` to be read through a buffer; its own lines are slow, and only its `read` is tried again."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

"""The tensors of saved models, read and written in slices, so that no model and no tensor is ever whole in memory.

A safetensors file is eight bytes with the length of a JSON header, the header, and the raw bytes of the tensors; see
https://huggingface.co/docs/safetensors.
"""

import ctypes
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bge_accel.files.parsing import decode_json, load_json
from bge_accel.files.text import first_line, shorten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENDINGS = (".safetensors", ".bin")
# What DDP, torch.compile and sentence-transformers put before the name of every tensor of the model that they hold.
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|0\.auto_model)\.)+")
_POINTER = b"version https://git-lfs"  # how the files begin that Git LFS keeps in place of large ones
_MOST_DIMS = 64  # torch's own limit
_LONGEST_HEADER = 100_000_000  # the library's own limit


class Layout(NamedTuple):
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Place(NamedTuple):
    """Where a tensor's bytes lie: in a file, or in memory."""

    path: str
    offset: int = 0
    values: torch.Tensor | None = None
    """Of a `.bin` file: (n,), mapped or, where they do not lie in order, a copy."""
    is_mapped: bool = False


class TensorFiles:
    """The tensors of one model folder: `model.safetensors` or `pytorch_model.bin`, each single or sharded.

    Of `.bin` files only tensors are read (`weights_only`).

    Attributes:
        tensors: the layout of each, by name.
        wrapper: what stood before every name and has been taken off, like "module." of DDP; mostly "".

    Raises:
        ValueError: there are none, or a file is damaged.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.tensors: dict[str, Layout] = {}
        self._places: dict[str, _Place] = {}
        self._handles: dict[str, int] = {}
        found = next((name for name in (SINGLE, INDEX, BIN, BIN_INDEX) if os.path.isfile(self._path(name))), None)
        if found is None:
            raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {BIN}, nor the index of a sharded one")
        wanted = self._read_index(found) if found.endswith(".json") else None
        for name in [found] if wanted is None else sorted(set(wanted.values())):
            path = self._path(name)
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing, which {found} names")
            self._open_safetensors(path) if path.endswith(".safetensors") else self._open_bin(path)
        if wanted is not None and wanted.keys() != self.tensors.keys():
            name = sorted(wanted.keys() ^ self.tensors.keys())[0]
            raise ValueError(f"{self._path(found)} and the files it names differ: {name} is in one of them only")
        wrapper = _WRAPPERS.match(next(iter(self.tensors), ""))
        self.wrapper = wrapper[0] if wrapper and all(name.startswith(wrapper[0]) for name in self.tensors) else ""
        self.tensors = {name.removeprefix(self.wrapper): layout for name, layout in self.tensors.items()}
        self._places = {name.removeprefix(self.wrapper): place for name, place in self._places.items()}

    def read(self, name: str, start: int, into: torch.Tensor) -> None:
        """Reads raw bytes of a tensor.

        Args:
            start: first byte, counted from the beginning of the tensor.
            into: (bytes,) uint8, filled to its end.
        """
        path, offset, values, is_mapped = self._places[name]
        if values is not None:
            source = values.view(torch.uint8)[start : start + len(into)]
            into.copy_(source)
            if is_mapped:
                _forget(source)
            return
        if path not in self._handles:
            self._handles[path] = os.open(path, os.O_RDONLY)
        view, done = into.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._handles[path], [view[done:]], offset + start + done)
            if count == 0:
                raise ValueError(f"{path} ends inside the tensor {name}: it has been changed while it was read")
            done += count

    def close(self) -> None:
        """Closes the files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
        self._places.clear()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _read_index(self, name: str) -> dict[str, str]:
        path = self._path(name)
        content = load_json(path)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f'{path} is no index of weights: it has no "weight_map"')
        for file in files.values():
            if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(_ENDINGS):
                raise ValueError(f"{path} names {shorten(file)}, which is not a file of this folder")
        return files

    def _open_safetensors(self, path: str) -> None:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            beginning = file.read(len(_POINTER))
            _check_not_pointer(path, beginning)
            length = int.from_bytes(beginning[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{path} is no safetensors file, or it is cut short")
            try:
                header = decode_json(file.read(length))
            except ValueError as error:
                raise ValueError(f"{path}: its header is damaged ({error})") from None
        if not isinstance(header, dict):
            raise ValueError(f"{path}: its header is damaged ({shorten(header)})")
        header.pop("__metadata__", None)
        spans = []
        for name, entry in header.items():
            wrong = f"{path}: its header is damaged ({shorten(name)}: {shorten(entry)})"
            if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
                raise ValueError(wrong)
            dtype, shape, offsets = entry["dtype"], _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
            if shape is None or offsets is None or len(shape) > _MOST_DIMS or len(offsets) != 2:
                raise ValueError(wrong)
            if dtype not in DTYPES:
                raise ValueError(f"{path}: the tensor {name} is of type {dtype}, which is not supported here")
            layout, (start, stop) = Layout(DTYPES[dtype], tuple(shape)), offsets
            if stop - start != layout.num_bytes or 8 + length + stop > size:
                raise ValueError(f"{path} does not hold the whole tensor {name}: it is cut short or damaged")
            self._add(name, layout, _Place(path, 8 + length + start))
            spans.append((start, stop))
        spans.sort()
        # By the format all bytes belong to a tensor, and each to one alone.
        if [start for start, _ in spans] + [size - 8 - length] != [0] + [stop for _, stop in spans]:
            raise ValueError(f"{path} is damaged: its header leaves bytes out, or gives some to two tensors")

    def _open_bin(self, path: str) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a damaged or foreign pickle makes of itself
            with open(path, "rb") as file:
                _check_not_pointer(path, file.read(len(_POINTER)))
            raise ValueError(
                f"{path} cannot be read as tensors alone ({first_line(error)}); load it "
                "where you trust it and save it with save_pretrained"
            ) from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path} holds a {type(loaded).__name__}, no tensors by name")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{path}: {shorten(name)} is a {type(tensor).__name__}, no tensor")
            # A view that repeats itself could stand for more than any memory holds.
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise ValueError(f"{path}: {name} is no plain tensor; save the model with save_pretrained")
            if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
                raise ValueError(
                    f"{path} does not hold the whole tensor {name}: it repeats the values of a smaller one"
                )
            place = _Place(path, values=tensor.detach().reshape(-1), is_mapped=tensor.is_contiguous())
            self._add(name, Layout(tensor.dtype, tuple(tensor.shape)), place)

    def _add(self, name: str, layout: Layout, place: _Place) -> None:
        if name in self.tensors:
            raise ValueError(f"{place.path}: the tensor {name} is also in another file of {self.folder}")
        self.tensors[name], self._places[name] = layout, place


def _check_not_pointer(path: str, start: bytes) -> None:
    if start == _POINTER:
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: `git lfs pull` fetches it")


def _counts(value: Any) -> list[int] | None:
    """The value where it is a list of counts."""
    is_counts = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
    return value if is_counts else None


def _forget(mapped: torch.Tensor) -> None:
    """Gives the memory of mapped bytes back to the system; read again, they come from the file."""
    if not hasattr(mmap, "MADV_DONTNEED") or not len(mapped):
        return
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (mapped.data_ptr() + len(mapped)) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


# ---- writing


def parse_size(size: int | str) -> int:
    """Bytes of a size like 5GB, 500MB or 1.5GiB, or a number of bytes.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"the size {size!r} is not like 5GB, 500MB or 1GiB")
    power = " KMGT".index(match[2].upper() or " ")
    number = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if number < 1:
        raise ValueError(f"the size {size!r} has to be at least one byte")
    return number


def plan_shards(tensors: Mapping[str, Layout], max_shard_size: int) -> dict[str, list[str]]:
    """Names of the files to write, and of the tensors in each, in the order in which they have to be written.

    A tensor that is larger than `max_shard_size` has a file to itself.
    """
    # Widest types first, as the format's own library has them: every tensor then starts at a multiple of its type.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shards: list[list[str]] = [[]]
    size = 0
    for name in ordered:
        if shards[-1] and size + tensors[name].num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_index(path: str, tensors: Mapping[str, Layout], shards: Mapping[str, Sequence[str]]) -> None:
    """Writes the JSON that says which file holds which tensor."""
    metadata = {
        "total_parameters": sum(layout.numel for layout in tensors.values()),
        "total_size": sum(layout.num_bytes for layout in tensors.values()),
    }
    weight_map = {name: file for file, names in shards.items() for name in names}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, file, indent=2)


def write_safetensors(path: str, tensors: Mapping[str, Layout], chunks: Iterable[torch.Tensor]) -> None:
    """Writes a safetensors file.

    Args:
        tensors: what it is to hold, in this order.
        chunks: contiguous tensors of any type whose bytes, one after another, are those of all `tensors`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, layout in tensors.items():
        offsets = [size, size := size + layout.num_bytes]
        header[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        for chunk in chunks:
            view = chunk.reshape(-1).view(torch.uint8).numpy().data
            size -= len(view)
            _write_all(file, view)
    assert size == 0, "the chunks are not the tensors"


def _write_all(file: Any, view: memoryview) -> None:
    while len(view):  # a disk that is nearly full takes a part
        view = view[file.write(view) :]

"""Small JSON and YAML files, read within limits: what is too large, too deep or no UTF-8 is refused."""

import json
import math
import os
import re
from typing import Any

from bge_accel.files.faults import BrokenFileError, Faults
from bge_accel.files.text import shorten

BOM = b"\xef\xbb\xbf"


UNREADABLE = object()


LARGEST_JSON = 2**27


LARGEST_YAML = 2**20


MOST_YAML_NODES = 100_000  # every alias counted as what it stands for


DEEPEST = 100  # what is nested deeper, Python may read and then not be able to write or compare


def parse_json(where: str, raw: bytes, faults: Faults) -> Any:
    """The JSON value in `raw`, or `UNREADABLE` after a fault."""
    try:
        return decode_json(raw)
    except ValueError as error:
        faults.add(where, str(error))
        return UNREADABLE


def decode_json(raw: bytes, *, is_text: bool = True) -> Any:
    """The JSON value in `raw`; ValueError says what is wrong with it.

    Args:
        is_text: whether strings have to be text; names of files need not be.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
        if is_text and ("\\ud" in text or "\\uD" in text):  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        found = raw[max(0, error.start - 20) :][:40]
        raise ValueError(f"broken UTF-8 at byte {error.start} of the line: {found!r}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        what = f"{half} is half of a character (a lone surrogate); remove it or write the whole character"
        raise ValueError(what) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ValueError(f"not JSON ({error}): {shorten(raw[:80].decode('utf-8', 'replace'))}") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"nested more than {DEEPEST} deep: {shorten(text[:80])}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        inside = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inside if isinstance(item, dict | list | tuple)]
    return bool(level)


def load_json(path: str) -> Any:
    """The value of a JSON file that is small: a manifest, an index, a configuration.

    Raises:
        ValueError: with the file, where it is not there, is too large, or is no JSON.
    """
    raw = _read_small(path, LARGEST_JSON)
    try:
        return decode_json(raw, is_text=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {str(error).replace(' of the line', '')}") from None


def load_yaml(path: str) -> Any:
    """The value of a YAML file; text, numbers, lists and mappings alone, and no alias that multiplies them.

    Raises:
        ValueError: with the file, and the line as far as YAML says it.
    """
    return _decode_yaml(path, _read_small(path, LARGEST_YAML))


def read_front_matter(path: str) -> dict[str, Any]:
    """The YAML between two lines of `---` at the head of a Markdown file; empty where there is none.

    Raises:
        ValueError, OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        head = re.match(rb"---\r?\n(.*?)^---[ \t\r]*$", file.read(LARGEST_YAML), re.DOTALL | re.MULTILINE)
    value = _decode_yaml(path, head[1]) if head else None
    return value if isinstance(value, dict) else {}


def _decode_yaml(path: str, raw: bytes) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > DEEPEST:  # PyYAML takes a time quadratic in the depth
                raise ValueError(f"nested more than {DEEPEST} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    line, name = key.start_mark.line + 1, (key.tag, key.value)
                    if name in lines:  # PyYAML would take the last
                        raise ValueError(f"{key.value} is given twice, in lines {lines[name]} and {line}; keep one")
                    lines[name] = line
            return node

    try:
        loader = Loader(raw.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > MOST_YAML_NODES:
            raise ValueError(f"with its aliases written out it has more than {MOST_YAML_NODES:,} values")
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: nested too deeply") from None
    # AttributeError and others: a tag (!!timestamp, !!bool) before what is none.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    return value


def _num_nodes(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for; infinitely many where it is inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        if isinstance(node.value, str):
            node.value.encode("utf-8")  # no lone surrogates
            inside = []
        else:
            inside = [item for entry in node.value for item in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_num_nodes(item, known) for item in inside)
    return known[id(node)]


def is_inside(name: Any) -> bool:
    """Whether a name that stands in a file leads to something below that file's folder."""
    return isinstance(name, str) and name != "" and not os.path.isabs(name) and ".." not in name.split("/")


def _read_small(path: str, limit: int) -> bytes:
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
            raise BrokenFileError(f"{path} cannot be read: it is no file")
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) > limit:
        raise BrokenFileError(f"{path} cannot be read: it is larger than {limit >> 20} MB")
    return raw

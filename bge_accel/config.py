"""YAML and command line into one plain dataclass.

A script declares a flat dataclass and calls `parse_config(Config)`. Written on argparse alone, so that `--help` answers
before any heavy package is imported. The order of precedence is: defaults, `--config run.yaml`, command line.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union

from bge_accel.files.parsing import load_yaml
from bge_accel.files.text import near_path, printable

T = TypeVar("T")
SECRETS = ("--token",)
LARGEST = 1e300
MOST = 10**15  # of an integer: numpy's products with it do not overflow
# Short names that people try, and what they mean in one script or another.
COMMON_NAMES = {
    "batch_size": ("per_device_train_batch_size",),
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "model": ("model_name_or_path", "encoder", "model_names_or_paths"),
    "max_length": ("passage_max_len", "max_passage_length"),
}


class Refusal(NamedTuple):
    """Why a flag that other tools know is not taken here.

    `use_instead` is one line that names the replacement. A value in `harmless` asks for what happens anyway and passes.
    """

    use_instead: str
    harmless: tuple[str, ...] = ()


class Bounds(NamedTuple):
    """What a flag's number, or each number of its list, has to be."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allow(self, number: float) -> bool:
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        given = {name.replace("_", " "): bound for name, bound in self._asdict().items() if bound is not None}
        return ", and ".join(f"{name} {bound}" for name, bound in given.items())


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
    needs: Mapping[str, str] | None = None,
    excludes: Mapping[str, str] | None = None,
    affects_learning: bool = True,
    in_card: Literal["value", "last part", "file name", "never"] = "value",
    aliases: Sequence[str] = (),
    group: str = "",
) -> Any:
    """A dataclass field with help text; `aliases` are further names of the flag, `group` its heading in
    `--help`, which holds for the fields after it too.

    Every number has its bounds: `at_least` or `above`, and `at_most` or `below` where there is an upper one. One that may
    be any says so by `above=-math.inf`.

    Args:
        choices: of a text, read from a table.
        needs: flags without which this one makes no sense, each with the reason; see `check_rules`.
        excludes: flags that cannot be given with this one, each with the way out.
        affects_learning: whether a run that is gone on with says so where its value has changed.
        in_card: what the card of a saved model shows of it. A path's folders are nobody else's business: "last part" leaves
            out those of an absolute one, "file name" of any.
    """
    metadata = {
        **{"help": help, "aliases": tuple(aliases), "group": group, "choices": choices, "in_card": in_card},
        **{"bounds": Bounds(at_least, above, at_most, below), "affects_learning": affects_learning},
        **{"needs": needs or {}, "excludes": excludes or {}},
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, **rules: Any) -> Any:
    """A dataclass field that has to be given, by `--config` or on the command line; `rules` are those of `option`."""
    return dataclasses.field(metadata=option(None, help, **rules).metadata)


def check_rules(config: Any) -> None:
    """Raises ValueError where a flag that is given lacks one that it needs, or excludes another that is given."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    given = {name for name, field in fields.items() if _is_on(config, name) and getattr(config, name) != field.default}
    for name in (name for name in fields if name in given):
        for other, reason in fields[name].metadata["needs"].items():
            if not _is_on(config, other):
                raise ValueError(f"--{name} needs --{other}: {reason}")
        for other, way_out in fields[name].metadata["excludes"].items():
            if other in given and other != name:
                raise ValueError(f"--{name} and --{other} exclude each other; {way_out}")


def _is_on(config: Any, name: str) -> bool:
    value = getattr(config, name)
    return value > 0 if isinstance(value, int | float) else bool(value)


def learning_settings(config: Any) -> dict[str, Any]:
    """What is learnt and how: the settings whose change since a checkpoint is worth a word."""
    kept = {field.name for field in dataclasses.fields(config) if field.metadata["affects_learning"]}
    return {name: value for name, value in dataclasses.asdict(config).items() if name in kept}


def without_secrets(config: T) -> T:
    """The settings without what nobody else may know."""
    secret = {field.name: None for field in dataclasses.fields(config) if field.metadata["in_card"] == "never"}  # type: ignore[arg-type]
    return dataclasses.replace(config, **secret)  # type: ignore[type-var]


def shown_in_card(config: T) -> T:
    """The settings as the card of a saved model shows them."""

    def shown(value: Any, how: str) -> Any:
        if isinstance(value, list):
            return [shown(item, how) for item in value]
        cut = isinstance(value, str) and (how == "file name" or (how == "last part" and os.path.isabs(value)))
        return os.path.basename(os.path.normpath(value)) if cut else value

    hows = {field.name: field.metadata["in_card"] for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {name: shown(getattr(config, name), how) for name, how in hows.items()}
    return without_secrets(dataclasses.replace(config, **values))  # type: ignore[type-var]


def options_from(record: type[T], config: Any, **others: Any) -> T:
    """A record of options whose fields have the names of flags, taken from a script's settings.

    Args:
        others: fields that are no flags, or have another value.
    """
    names = {field.name for field in dataclasses.fields(record)} - set(others)  # type: ignore[arg-type]
    return record(**{name: getattr(config, name) for name in names}, **others)


def parse_config(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    refused: Mapping[str, Refusal] | None = None,
) -> T:
    """Fill `config_class` (a flat dataclass) from `--config FILE.yaml` and the command line, the latter winning.

    Field types: str, int, float, bool, Literal, list of these, each also optional. Booleans take `--flag`,
    `--flag True|False` and `--no_flag`; every flag may be written with `-` for `_`. Names are never abbreviated.
    Numbers keep to their `Bounds`. Of a value given twice on the command line the last one counts, so that a batch file can
    have defaults before "$@"; a list is given once. Mistakes end the program with status 2 and one line that says what is
    wrong, in YAML as on the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    refused = refused or {}
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for field in fields.values():
        if choices := tuple(field.metadata["choices"]):
            hints[field.name] = Literal[choices] | None
    names = {alias: field.name for field in fields.values() for alias in (field.name, *field.metadata["aliases"])}
    parser = _Parser(
        description=description, formatter_class=_HelpFormatter, allow_abbrev=False, known=[*names, *refused]
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file that sets any of these; the command line wins")
    groups: dict[str, Any] = {}
    title = ""
    for field in fields.values():
        title = field.metadata["group"] or title
        target = groups.setdefault(title, parser.add_argument_group(title)) if title else parser
        _add_argument(target, field, hints[field.name])
    for name, refusal in refused.items():
        parser.add_argument(
            *_flags(name), dest="_refused", action=_refuse(name, refusal), nargs="*", help=argparse.SUPPRESS
        )

    values = vars(parser.parse_args(argv))
    if argv == sys.argv[1:]:
        hide_secrets(sys.argv)
    values.pop("_refused", None)
    path = values.pop("config", None)
    for name, value in values.items():
        _check_value(parser, f"--{name}", value, fields[name])
    if path is not None:
        values = {**_read_yaml(path, parser, names, fields, hints, refused), **values}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        parser.error("missing: " + ", ".join(f"--{name}" for name in missing))
    return config_class(**values)


def hide_secrets(argv: list[str]) -> None:
    """Puts *** for the value of `--token` in a command line, of which trackers and errors keep a copy."""
    for index, part in enumerate(argv):
        flag, equals, _ = part.partition("=")
        if flag in SECRETS and equals:
            argv[index] = f"{flag}=***"
        elif flag in SECRETS and index + 1 < len(argv):
            argv[index + 1] = "***"


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def check_model_path(flag: str, name: str) -> None:
    """Raises ValueError where a model's name is clearly a path and no folder stands there.

    Without it a mistyped path would be looked for on the hub, for minutes where there is no network.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    if is_path and not os.path.isfile(os.path.join(name, "config.json")):
        what = "has no config.json, so it is no model" if os.path.isdir(name) else "is not a folder"
        raise ValueError(f"{flag} {name} {what}; name a folder with a saved model, or a model on the hub")
    near = None if is_path or "/" in name else near_path(name)
    if near and os.path.isfile(os.path.join(near, "config.json")):
        raise ValueError(f"{flag} {name} is not a folder; did you mean {near}?")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.option_strings == ["-h", "--help"]:
            return super()._format_action_invocation(action)
        shown = [flag for flag in action.option_strings if "-" not in flag[2:]]
        metavar = "" if action.nargs == 0 else " " + self._format_args(action, (action.dest or "").upper())
        return ", ".join(shown) + metavar


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest known name beside an unknown one."""

    def __init__(self, *args: Any, known: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known = known
        # What begins with one minus is a value (-1e-5, -5-10), not only what argparse takes for a negative number.
        self._negative_number_matcher = re.compile("-(?!-)")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)}\n(run {self.prog} --help for every flag)\n")

    def unknown(self, name: str, where: str) -> NoReturn:
        """Ends with the nearest known name, written as the unknown one was: with dashes or without."""
        common = [other for other in COMMON_NAMES.get(name, ()) if other in self.known]
        near = common or difflib.get_close_matches(name, self.known, n=1)
        dashes = "--" if where.startswith("unknown argument") else ""
        self.error(f"{where}" + (f"; did you mean {dashes}{near[0]}?" if near else ""))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
            self.unknown(name, f"unknown argument {rest[0]}")
        return parsed


def _flags(name: str) -> list[str]:
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        assert len(inner) == 1, f"one type per flag: {hint}"
        return inner[0], True
    return hint, False


def _convert(text: Any, hint: Any) -> Any:
    """One value to the type `hint`; raises ValueError with what was expected."""
    hint, is_optional = _strip_optional(hint)
    if is_optional and (text is None or text == "None"):
        return None
    origin = typing.get_origin(hint)
    if origin is list:
        items = text if isinstance(text, list) else [text]
        return [_convert(item, typing.get_args(hint)[0]) for item in items]
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(text, bool):  # YAML's yes and no
            text = {True: "yes", False: "no"}[text]
        if text in choices:
            return text
        raise ValueError(f"{text!r} is not one of {', '.join(map(str, choices))}")
    if hint is bool:
        if isinstance(text, bool):
            return text
        if isinstance(text, str) and text.lower() in ("true", "yes", "1"):
            return True
        if isinstance(text, str) and text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(f"{text!r} is not True or False")
    if hint is str:
        if isinstance(text, str):
            return text
        raise ValueError(f"{text!r} is not a string; put it in quotes")
    if hint in (int, float) and not isinstance(text, bool):
        try:
            number = hint(text)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and abs(number) < LARGEST and (not isinstance(text, float) or number == text):
            if hint is int and abs(number) > MOST:
                raise ValueError(f"{text!r} is too large")
            return number
    raise ValueError(f"{text!r} is not {'an integer' if hint is int else 'a number'}")


def _add_argument(target: Any, field: dataclasses.Field, hint: Any) -> None:
    inner, _ = _strip_optional(hint)
    origin = typing.get_origin(inner)

    def convert(text: str) -> Any:
        try:
            return _convert(text, typing.get_args(inner)[0] if origin is list else hint)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    help_text = field.metadata["help"]
    for rule, flags_of_rule in (("needs", field.metadata["needs"]), ("not with", field.metadata["excludes"])):
        if flags_of_rule:
            help_text += f" ({rule} {', '.join(f'--{name}' for name in flags_of_rule)})"
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        help_text += " (required)"
    elif field.default not in (None, dataclasses.MISSING, ""):
        help_text += f" (default: {field.default})"
    kwargs: dict[str, Any] = {
        "dest": field.name,
        "type": convert,
        "help": help_text.replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if inner is bool:
        kwargs.update(nargs="?", const=True, metavar="True|False")
    elif origin is list:
        kwargs.update(nargs="+", metavar="VALUE", action=_StoreList)
    elif origin is Literal:
        kwargs.update(metavar="|".join(map(str, typing.get_args(inner))))
    else:
        kwargs.update(metavar={int: "N", float: "X"}.get(inner, "TEXT"))
    flags = [flag for name in (field.name, *field.metadata["aliases"]) for flag in _flags(name)]
    target.add_argument(*flags, **kwargs)
    if inner is bool:
        off = [flag for name in (field.name, *field.metadata["aliases"]) for flag in _flags(f"no_{name}")]
        target.add_argument(
            *off, dest=field.name, action="store_const", const=False, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


class _StoreList(argparse.Action):
    """Stores a list, and refuses another for the same flag, which would drop the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if getattr(namespace, self.dest, values) != values:
            parser.error(f"--{self.dest} is given twice; name all of its values after one --{self.dest}")
        setattr(namespace, self.dest, values)


def _check_value(parser: _Parser, shown: str, value: Any, field: dataclasses.Field) -> None:
    if value == "" and field.default is None and "instruction" not in field.name:  # a variable that is not set
        parser.error(f"{shown} is empty: give it a value, or leave it out")
    bounds: Bounds = field.metadata["bounds"]
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not bounds.allow(number):
            left_out = ", or left out" if field.default is None else ""
            parser.error(f"{shown} is {str(number).removesuffix('.0')}: it has to be {bounds}{left_out}")


def _is_harmless(given: str, refusal: Refusal) -> bool:
    spelled = {"true": "True", "yes": "True", "false": "False", "no": "False"}.get(given.lower(), given)
    same = {"1": "True", "0": "False"}.get(given, given)
    return any(value in refusal.harmless for value in (given, spelled, same))


def _refuse(name: str, refusal: Refusal) -> type[argparse.Action]:
    class Refuse(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            given = " ".join(values) if values else "True"
            if not _is_harmless(given, refusal):
                parser.error(f"--{name} is not available: {refusal.use_instead}")

    return Refuse


def _read_yaml(
    path: str,
    parser: _Parser,
    names: Mapping[str, str],
    fields: Mapping[str, dataclasses.Field],
    hints: Mapping[str, Any],
    refused: Mapping[str, Refusal],
) -> dict[str, Any]:
    try:
        content = load_yaml(path)
    except ValueError as error:
        parser.error(f"--config {error}")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected `key: value` lines, found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in refused:
            if value is not None and not _is_harmless(str(value), refused[name]):
                parser.error(f"{path}: {key} is not available: {refused[name].use_instead}")
            continue
        if name not in names:
            parser.unknown(name, f"{path}: unknown key {key!r}")
        if names[name] in values:
            parser.error(f"{path}: {key} is given twice, the other time under another name; keep one")
        try:
            values[names[name]] = _convert(value, hints[names[name]])
        except ValueError as error:
            parser.error(f"{path}: {key}: {error}")
        _check_value(parser, f"{path}: {key}", values[names[name]], fields[names[name]])
    return values


@contextmanager
def user_errors(*, by_all: bool = False) -> Iterator[None]:
    """Ends the program with status 2 and the message alone where the user's input is at fault (ValueError).

    Under several processes the first of each machine speaks, or `by_all`, where each finds its own faults.
    """
    try:
        yield
    except ValueError as error:
        if by_all or os.environ.get("LOCAL_RANK", "0") == "0":
            print(printable(f"{os.path.basename(sys.argv[0])}: error: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(2) from None

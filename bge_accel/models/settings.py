"""What a model says of itself: pooling, instructions, lengths; from its folder or the hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bge_accel.files.parsing import is_inside, load_json
from bge_accel.files.text import shorten
from bge_accel.models.pooling import POOLING, pooling_of_st

# Fields of EmbeddingSettings, and how they are called.
_SETTINGS = {
    "pooling": "pooling",
    "normalize": "normalisation",
    "query_prefix": "query instruction",
    "passage_prefix": "passage instruction",
    "max_length": "maximum length",
    "other_prompts": "other prompts",
}


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a checkpoint turns texts into embeddings, as far as it says so itself (None: it does not)."""

    pooling: str | None = None
    normalize: bool | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = None
    lower_case: bool = False
    other_prompts: dict[str, str] = field(default_factory=dict)

    def with_overrides(
        self,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
    ) -> "EmbeddingSettings":
        """What is given wins over what the checkpoint says; where both are silent, CLS and normalised (BGE's way)."""
        if pooling is not None and pooling not in POOLING:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLING)}")
        return replace(
            self,
            pooling=pooling or self.pooling or "cls",
            normalize=next((value for value in (normalize, self.normalize) if value is not None), True),
            query_prefix=self.query_prefix if query_prefix is None else query_prefix,
            passage_prefix=self.passage_prefix if passage_prefix is None else passage_prefix,
        )


def differing_settings(models: Sequence[tuple[str, EmbeddingSettings]]) -> str:
    """What models do not embed alike by, in words, each value with the models that have it; "" where nothing differs."""
    found = []
    for name, called in _SETTINGS.items():
        values: dict[str, list[str]] = {}
        for model, settings in models:
            value = getattr(settings, name)
            if name != "max_length" or value is not None:  # without one of its own a model's tokenizer says it
                values.setdefault("none" if value in ("", {}, None) else shorten(value, 60), []).append(model)
        if len(values) > 1:
            found.append(f"{called} " + ", ".join(f"{value} in {' and '.join(of)}" for value, of in values.items()))
    return "; ".join(found)


def instruction_prefix(instruction: str | None, format: str = "{}{}") -> str | None:
    """The text that an instruction and its format (FlagEmbedding's `{}{}`) put before a query or passage.

    Returns None where no instruction is given.

    Raises:
        ValueError: the format does not end with the text itself. A saved model keeps its instruction as a prefix,
            which is all that sentence-transformers prompts can say.
    """
    if instruction is None:
        return None
    format = format.replace("\\n", "\n")
    try:
        whole = format.format(instruction, "\0")
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"instruction format {format!r} needs two {{}}: instruction and text ({error})") from None
    if not whole.endswith("\0") or whole.count("\0") != 1:
        raise ValueError(
            f"instruction format {format!r} has to end with the text, as in '{{}}{{}}' or 'A: {{}}\\nB: {{}}'"
        )
    return whole[:-1]


def read_settings(model_name_or_path: str, **hub: Any) -> EmbeddingSettings:
    """What a folder or hub model says of itself in its sentence-transformers files; empty where it has none.

    Args:
        hub: `cache_dir`, `token`, `revision` for models on the hub.

    Raises:
        ValueError: its modules do something that this project does not (a pooling other than CLS, mean or last token,
            a dense layer).
    """
    modules = _read_json(model_name_or_path, "modules.json", hub)
    if modules is None:
        return EmbeddingSettings()
    pooling: str | None = None
    normalize = False
    for type_name, path in read_modules(model_name_or_path, modules):
        kind = type_name.rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _read_pooling(model_name_or_path, path, hub)
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Transformer", "Dropout"):
            raise ValueError(f"{model_name_or_path}: its module {type_name} is not supported here")
    transformer = _read_object(model_name_or_path, "sentence_bert_config.json", hub)
    prompts_file = _read_object(model_name_or_path, "config_sentence_transformers.json", hub)
    longest, prompts = transformer.get("max_seq_length"), prompts_file.get("prompts") or {}
    if longest is not None and (type(longest) is not int or not 0 < longest < 2**31):
        raise ValueError(
            f'{model_name_or_path}: "max_seq_length" is {shorten(longest)}: it has to be a number of tokens'
        )
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f'{model_name_or_path}: "prompts" is {shorten(prompts)}: each has to be a text by its name')
    prompts, default_name = dict(prompts), prompts_file.get("default_prompt_name")
    default = prompts.get(default_name, "") if isinstance(default_name, str) else ""
    query_prefix = prompts.pop("query", default)
    passage_name = next((name for name in ("document", "passage", "corpus") if prompts.get(name)), "document")
    passage_prefix = prompts.pop(passage_name, default)
    return EmbeddingSettings(
        pooling=pooling,
        normalize=normalize,
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        max_length=longest,
        lower_case=bool(transformer.get("do_lower_case")),
        other_prompts={name: text for name, text in prompts.items() if name != "document"},
    )


def read_modules(model: str, modules: Any) -> list[tuple[str, str]]:
    """Type and folder of each module in what a `modules.json` holds.

    Raises:
        ValueError: it is no list of modules, or one lies outside the model.
    """
    if not isinstance(modules, list):
        raise ValueError(f"{model}: its modules.json is {shorten(modules)}: it has to be a list")
    found = []
    for module in modules:
        kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str):
            raise ValueError(f"{model}: its modules.json has {shorten(module)}, which is no module")
        if path and not is_inside(path):
            raise ValueError(f"{model}: its modules.json names {shorten(path)}, which is not inside the model")
        found.append((kind, path or ""))
    return found


def _read_pooling(model: str, path: str, hub: dict[str, Any]) -> str:
    config = _read_object(model, f"{path}/config.json" if path else "config.json", hub)
    if config.get("include_prompt") is False:
        raise ValueError(f"{model}: pooling that leaves out the prompt (include_prompt: false) is not supported here")
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = mode if isinstance(mode, list) else [mode]
    else:
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    found = pooling_of_st(modes[0]) if len(modes) == 1 else None
    if found is None:
        raise ValueError(f"{model}: pooling {modes} is not supported; here it is one of {', '.join(POOLING)}")
    return found


def _read_json(model: str, name: str, hub: dict[str, Any]) -> Any:
    if os.path.isdir(model):
        inside = os.path.join(model, name)
        path = inside if os.path.isfile(inside) else None
    else:
        path = _from_hub(model, name, hub)
    if path is None:
        return None
    return load_json(path)


def _read_object(model: str, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    content = _read_json(model, name, hub)
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{model}: its {name} is {shorten(content)}: it has to be an object {{...}}")
    return content or {}


def _from_hub(model: str, name: str, hub: dict[str, Any]) -> str | None:
    """Path of a hub model's file; None where the model is known not to have it, never where that cannot be told."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {key: value for key, value in hub.items() if key in ("cache_dir", "revision")}
    cached = try_to_load_from_cache(model, name, **where)
    if cached is not None and not isinstance(cached, str):  # known to be absent
        return None
    try:
        return hf_hub_download(model, name, **hub)
    except LocalEntryNotFoundError:
        raise ValueError(
            f"cannot load the model {model!r}: {name}, which says how it pools, is not in the local cache and the hub "
            "cannot be reached; "
            f"run `hf download {model}` where there is a network, or name a folder (HF_HUB_OFFLINE=1 saves the wait)"
        ) from None
    except EntryNotFoundError:
        return None

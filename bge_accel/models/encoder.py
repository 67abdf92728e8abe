"""The encoder with its pooling and normalisation: loading, saving, and what a checkpoint says of itself."""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from bge_accel.config import check_model_path
from bge_accel.data.reading import first_line, is_inside, load_json, shorten
from bge_accel.encoding.batching import TOKENIZING
from bge_accel.kernels import last_layer
from bge_accel.kernels.packed import PACKED_POOLING_METHODS, pad, pool_packed, why_not
from bge_accel.models.tensor_files import TensorFiles
from bge_accel.processes.group import warn

POOLING_METHODS = ("cls", "mean", "last_token")
MOST_PROGRAMS = 16  # of `compile_layers`
LEAST_VOCABULARY = 3  # tokens beside special ones; without a vocabulary T5's tokenizer has 1, and DeBERTa's 2
COMPUTED = ("inv_freq", "masked_bias", "position_ids", "token_type_ids")
"""How the names of buffers end that the code of models computes itself, whether a file holds them or not."""
# Our names are FlagEmbedding's; these are sentence-transformers'.
_POOLING_TO_ST = {"cls": "cls", "mean": "mean", "last_token": "lasttoken"}
_POOLING_FROM_ST = {
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last_token",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}


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
        if pooling is not None and pooling not in POOLING_METHODS:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(POOLING_METHODS)}")
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


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, method: str) -> torch.Tensor:
    """Hidden states (n, length, dim) to one vector a text (n, dim), padding on either side ignored."""
    if method == "mean":
        weights = attention_mask.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        summed = torch.einsum("nld,nl->nd", hidden.to(weights.dtype), weights)
        return summed / weights.sum(1, keepdim=True).clamp(min=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), pooled_tokens(attention_mask, method)]


def pooled_tokens(attention_mask: torch.Tensor, method: str) -> torch.Tensor:
    """Places (n,) of the first or the last token of each text, padded on either side."""
    if method == "cls":
        return attention_mask.argmax(1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(1)


class Encoder(torch.nn.Module):
    """A transformer whose forward pass returns one embedding a text."""

    def __init__(self, backbone: torch.nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        assert pooling in POOLING_METHODS
        self.backbone, self.pooling, self.normalize = backbone, pooling, normalize
        self.config = backbone.config  # where DeepSpeed looks for the model's width
        self._knows_tokens = pooling in ("cls", "last_token") and last_layer.prepare(backbone)

    @property
    def pools_one_token(self) -> bool:
        """Whether the last layer computes no more than the token of each text that becomes its embedding."""
        return self._knows_tokens and why_not(self.config) is None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_padded: bool | None = None,
        **packed: Any,
    ) -> torch.Tensor:
        """(n, length) token ids and mask to (n, dim) embeddings, pooled and normalised in float32 or better.

        Args:
            is_padded: whether the mask leaves anything out, where that is known; else a GPU is waited for to tell.
            packed: instead of the mask, what `unpadded.pack` gives, after `unpadded.use_kernel`.
        """
        mask = attention_mask
        if mask is not None and is_padded is not None and why_not(self.config) is None:
            mask = mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1) if is_padded else None
        inputs = {"input_ids": input_ids, "attention_mask": mask, **packed}
        if self.pools_one_token:
            if attention_mask is not None:
                inputs["pooled_tokens"] = pooled_tokens(attention_mask, self.pooling)
            else:
                starts = packed["starts"]
                inputs["pooled_tokens"] = starts[:-1] if self.pooling == "cls" else starts[1:] - 1
        hidden = self.backbone(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pools_one_token:
                pooled = hidden.flatten(0, 1)  # one of the first two dimensions is 1
            elif attention_mask is None and self.pooling in PACKED_POOLING_METHODS:
                pooled = pool_packed(hidden[0], packed["starts"], self.pooling)
            elif attention_mask is None:
                pooled = pool(*pad(hidden[0], packed["starts"]), self.pooling)
            else:
                pooled = pool(hidden, attention_mask, self.pooling)
            if pooled.dtype in (torch.float16, torch.bfloat16):
                pooled = pooled.float()
            return F.normalize(pooled, dim=-1) if self.normalize else pooled


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
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in _POOLING_FROM_ST:
        raise ValueError(f"{model}: pooling {modes} is not supported; here it is one of {', '.join(POOLING_METHODS)}")
    return _POOLING_FROM_ST[modes[0]]


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


def load_encoder(
    model_name_or_path: str | os.PathLike[str],
    *,
    settings: EmbeddingSettings | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    longest: int = 0,
    gradient_checkpointing: bool = False,
    lengths: Mapping[str, int | None] | None = None,
    cut_by: Mapping[str, str] | None = None,
    other_prefixes: Mapping[str, Mapping[str, str]] | None = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> tuple[Encoder, Any, EmbeddingSettings]:
    """Loads an encoder and its tokenizer from a folder or the hub.

    Args:
        pooling, normalize, query_prefix, passage_prefix: override what the checkpoint says of itself.
        longest: tokens that texts will be cut to; raises the checkpoint's own maximum length where the model can.
        gradient_checkpointing: recompute activations layer by layer in the backward pass.
        lengths: see `check_lengths`; looked at before the weights are loaded.
        cut_by: which of `lengths` cuts a "query", which a "passage": their instructions have to leave room in it.
        other_prefixes: what stands before some queries or passages in place of the model's own; for each the place of
            the first row that says so, "" where it is no row's.
        hub: `cache_dir`, `token`, `revision`.

    Returns:
        The encoder in evaluation mode, the tokenizer, and the settings with nothing left open.

    Raises:
        ValueError: the model cannot be found or is of a kind that is not supported; a length leaves nothing of a text.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per file of a model that loads in a second
    model_name_or_path = os.fspath(model_name_or_path)
    hub = {key: value for key, value in hub.items() if value is not None}
    if config_name is None:
        check_model_path("the model", model_name_or_path)
    with loading(f"the model {model_name_or_path!r}"):
        settings = settings or read_settings(model_name_or_path, **hub)
        common = {"trust_remote_code": trust_remote_code, **hub}
        config = read_config(config_name or model_name_or_path, **common)
        tokenizer = load_tokenizer(tokenizer_name or model_name_or_path, **common)
        check_lengths(tokenizer, lengths or {})
        chosen = {
            "query": settings.query_prefix if query_prefix is None else query_prefix,
            "passage": settings.passage_prefix if passage_prefix is None else passage_prefix,
        }
        for kind, name in (cut_by or {}).items():
            length = (lengths or {}).get(name) or settings.max_length or max_positions(config)
            for prefix, place in [(chosen[kind], ""), *(other_prefixes or {}).get(kind, {}).items()]:
                check_prefix(tokenizer, prefix, length, name, kind, place)
        if gradient_checkpointing and not is_deepspeed_zero3_enabled():
            check_gradient_checkpointing(
                model_without_weights(encoder_class(config.model_type), model_name_or_path, config, trust_remote_code)
            )
        backbone = load_weights(
            encoder_class(config.model_type),
            model_name_or_path,
            config=config,
            dtype=dtype,
            needs_pooler=False,
            **common,
        )
    if gradient_checkpointing:
        check_gradient_checkpointing(backbone)
        enable_gradient_checkpointing(backbone)
    settings = settings.with_overrides(
        pooling=pooling, normalize=normalize, query_prefix=query_prefix, passage_prefix=passage_prefix
    )
    positions = max_positions(config)
    if longest > positions:
        raise ValueError(f"texts of {longest} tokens are asked for; {model_name_or_path} takes {positions} at most")
    own = settings.max_length or min(positions, tokenizer.model_max_length)
    settings = replace(settings, max_length=min(max(own, longest), positions))
    # A limit stored in the tokenizer would cut texts that the settings allow.
    tokenizer.model_max_length = settings.max_length
    if settings.lower_case:
        _lower_case(tokenizer)
    # Nothing trains the pooler of BERT-like models; left trainable it would stop DDP, dropped it would be lost.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler.requires_grad_(False)
    assert settings.pooling is not None and settings.normalize is not None
    return Encoder(backbone, settings.pooling, settings.normalize).eval(), tokenizer, settings


def check_lengths(tokenizer: Any, lengths: Mapping[str, int | None]) -> None:
    """Raises ValueError where a text would be cut to its special tokens alone, so that all texts would be the same.

    Args:
        lengths: tokens that texts will be cut to, by the flag or argument that says so; None where it says nothing.
    """
    special = tokenizer.num_special_tokens_to_add()
    for name, length in lengths.items():
        if length is not None and length <= special:
            raise ValueError(
                f"{name} is {length}: the model's tokenizer puts {special} special tokens into each text, so it has to be "
                f"at least {special + 1}"
            )


def check_prefix(tokenizer: Any, prefix: str, length: int, name: str, kind: str, place: str = "") -> None:
    """Raises ValueError where an instruction fills a text's whole length, so that all texts would be the same.

    Args:
        length: tokens that texts are cut to, special ones included.
        name: of the flag or argument that says so.
        kind: what the texts are, for the message.
        place: of the row whose instruction it is, as `file:line`.
    """
    with TOKENIZING:
        num_tokens = len(tokenizer(prefix, truncation=True, max_length=length)["input_ids"])
    if prefix and num_tokens >= length:
        raise ValueError(
            f"{place and f'{place}: '}{name} is {length}: the {kind} instruction {shorten(prefix)} fills it, and "
            f"nothing of any {kind} is left; make it larger, or the instruction shorter"
        )


def encoder_class(model_type: str) -> Any:
    """The class of transformers that loads encoders of a type: those of T5 without their decoder."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if model_type in ("t5", "mt5", "umt5") else AutoModel


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Has one line said where a model is neither in its folder nor on the hub, or needs another package (ValueError)."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"cannot load {what}: {first_line(error)}") from None
    except OSError as error:
        raise ValueError(
            f"cannot load {what}: it is neither a complete model folder nor to be had from the hub ({first_line(error)})"
        ) from None


def read_config(name: str, **options: Any) -> Any:
    """A model's configuration, from a folder or the hub; ValueError where it is none."""
    from transformers import AutoConfig

    with _configuring(name):
        return AutoConfig.from_pretrained(name, **options)


def model_without_weights(auto_class: Any, name: str, config: Any, trust_remote_code: bool = False) -> Any:
    """A model on the meta device, which takes no memory; ValueError where none can be made from its configuration."""
    with _configuring(name), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _configuring(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError):  # which say what is wrong
        raise
    except Exception as error:  # whatever a model's code does with a value that it does not expect
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name}: no model can be made from its config.json ({what})") from None


def load_tokenizer(name: str, **options: Any) -> Any:
    """A tokenizer from a folder or the hub, which pads on the right.

    Raises:
        ValueError: there is none, or it knows no words: from a configuration alone transformers makes a tokenizer that
            takes every word for an unknown one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # the package tokenizers raises nothing narrower
        if "trust_remote_code" in str(error) or (isinstance(error, OSError) and not os.path.isdir(name)):
            raise
        why = f"it cannot be loaded ({first_line(error)})"
    else:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        size = len(tokenizer.get_vocab()) if backend is None else backend.get_vocab_size()
        # On the left, a model of absolute positions would embed a text by the length of those beside it.
        tokenizer.padding_side = "right"
        if size - len(tokenizer.get_added_vocab()) >= LEAST_VOCABULARY:
            return _with_padding(name, tokenizer)
        why = "it knows special tokens alone"
    raise ValueError(
        f"{name} has no complete tokenizer: {why}; put its files (tokenizer.json, or the vocabulary) beside the model, "
        "from the model that it was made of; training also takes another with --tokenizer_name"
    )


def _with_padding(name: str, tokenizer: Any) -> Any:
    """The tokenizer with a padding token, as decoders have none: nothing attends to it, so any will do."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{name}: its tokenizer has neither a padding token nor one that ends a text; add one")
        warn(f"{name}: its tokenizer has no padding token; the one that ends a text, {tokenizer.eos_token}, is taken")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_weights(
    auto_class: Any,
    model: str,
    *,
    config: Any = None,
    needs_pooler: bool = True,
    otherwise: str = "the weights and config.json are of different models, or the weights are not complete",
    **options: Any,
) -> Any:
    """A model in evaluation mode with all its weights from its files: nothing that it computes with is made up.

    Args:
        auto_class: of transformers, like AutoModel.
        config: by default that of the model.
        needs_pooler: whether BERT's pooler is computed with; else one that no file holds is left out of the model.
        otherwise: what else to say where tensors are missing.
        options: of `from_pretrained`.

    Raises:
        ValueError: files are damaged, or lack tensors that the configuration asks for, or hold them in other shapes.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    wrapper = ""
    if config is None:
        names = ("trust_remote_code", "cache_dir", "token", "revision")
        config = read_config(model, **{name: options[name] for name in names if name in options})
    if not is_deepspeed_zero3_enabled():  # under which transformers shards a model while it is made
        model_without_weights(auto_class, model, config, options.get("trust_remote_code", False))
    if os.path.isdir(model):
        with closing(TensorFiles(model)) as files:  # of damaged ones transformers says less, and more at length
            wrapper = files.wrapper
    if wrapper:
        warn(f'{model}: "{wrapper}" stands before the name of every tensor and is taken off')
        options["key_mapping"] = {f"^{re.escape(wrapper)}": ""}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is said below
    try:
        loaded, found = auto_class.from_pretrained(
            model, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in found["missing_keys"] if name.rsplit(".", 1)[-1] not in COMPUTED)
    of_pooler = [name for name in missing if not needs_pooler and "pooler" in name.split(".")]
    lacking = [name for name in missing if name not in of_pooler]
    unused = sorted(name for name in found["unexpected_keys"] if name.rsplit(".", 1)[-1] not in COMPUTED)
    if lacking:
        other = f"; they hold {_names(unused)}, which it does not know" if unused else ""
        raise ValueError(
            f"{model}: its files lack {_names(lacking)}, which its configuration asks for{other}: {otherwise}"
        )
    for name, in_files, asked_for in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{model}: the shape of {name} is {tuple(in_files)} in its files and {tuple(asked_for)} by its configuration"
        )
    if unused:
        warn(f"{model}: its files hold {_names(unused)}, which a {type(loaded).__name__} does not use")
    if of_pooler and getattr(loaded, "pooler", None) is not None:
        loaded.pooler = None
    if wrapper:
        loaded._weight_conversions = None  # by which save_pretrained would put it before the names again
    return loaded.eval()


def _names(names: list[str]) -> str:
    """The first three of some tensors' names, and how many there are."""
    more = f" and {len(names) - 3:,} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def max_positions(config: Any) -> int:
    """The most tokens that a model takes."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    # In these the padding index takes the first ones.
    return positions - 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else positions


def _lower_case(tokenizer: Any) -> None:
    """Makes a tokenizer lower-case its input, if it does not yet (sentence-transformers' `do_lower_case`)."""
    from tokenizers.normalizers import Lowercase, Sequence

    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer else [])])


def check_gradient_checkpointing(backbone: Any) -> None:
    """Raises ValueError where the code of a model cannot recompute its activations."""
    if not getattr(backbone, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"--gradient_checkpointing: the code of {type(backbone).__name__} has none; leave it out: what does not fit "
            "--activation_memory_budget is recomputed anyway"
        )


def enable_gradient_checkpointing(backbone: Any) -> None:
    """Has a transformer recompute its activations layer by layer in the backward pass."""
    backbone.config.use_cache = False
    # transformers 5.20 renamed it.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(backbone: Any, device: torch.device) -> None:
    """Has torch.compile make one program of what the layers of a transformer have in common, for texts of any length.

    A handful is made in all, each at its first use: with and without gradients, with and without padding, for several
    texts and for one. What stands around the layers runs as before.

    Args:
        device: where they will run.

    Raises:
        ValueError: there is no compiler for what torch.compile writes.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise ValueError("--torch_compile needs the package triton on a GPU, and it is not installed; drop the flag")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not on_gpu and not any(map(shutil.which, compilers)):
        raise ValueError(
            f"--torch_compile needs a C++ compiler, and there is no {' or '.join(compilers)}; drop the flag"
        )
    # After so many torch.compile gives up, with a warning, and runs the layer as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_PROGRAMS)
    for layers in backbone.modules():
        if isinstance(layers, torch.nn.ModuleList):
            for layer in layers:
                layer.compile(dynamic=True)


def save_encoder(
    folder: str,
    encoder: Encoder,
    tokenizer: Any,
    settings: EmbeddingSettings,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    model_card: str | None = None,
) -> None:
    """Writes a folder that transformers, sentence-transformers and `EmbeddingModel` load alike.

    Args:
        state_dict: the weights of `encoder` where it does not hold them itself (sharded training).
        model_card: text of README.md.
    """
    os.makedirs(folder, exist_ok=True)
    backbone: Any = encoder.backbone
    if state_dict is None:
        backbone.save_pretrained(folder)
    else:  # transformers would look at the model's own tensors too, which are parts
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict({key.removeprefix("backbone."): value for key, value in state_dict.items()}, folder)
        backbone.config.architectures = [type(backbone).__name__.removeprefix("FSDP")]
        backbone.config.save_pretrained(folder)
    # safetensors makes its files readable by their owner alone; they are to be as open as the others.
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, name))
    with TOKENIZING:
        tokenizer("")  # without cutting: else the length that some texts were last cut to is saved with it
        tokenizer.save_pretrained(folder)
    assert settings.pooling is not None
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * bool(
        settings.normalize
    )
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for idx, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": backbone.config.hidden_size,
            **{key: name == settings.pooling for key, name in _POOLING_FROM_ST.items() if key.startswith("pooling_")},
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix, **settings.other_prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    }
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
    if settings.normalize:
        os.makedirs(os.path.join(folder, "2_Normalize"), exist_ok=True)
    if model_card is not None:
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(model_card)

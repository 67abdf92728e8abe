"""Configuration, tokenizer and weights of a checkpoint, each checked before it is used."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch

from bge_accel.files.text import first_line, shorten
from bge_accel.models.tensor_files import TensorFiles
from bge_accel.models.tokenizing import TOKENIZING
from bge_accel.processes.progress import warn

LEAST_VOCABULARY = 3  # tokens beside special ones; without a vocabulary T5's tokenizer has 1, and DeBERTa's 2


COMPUTED = ("inv_freq", "masked_bias", "position_ids", "token_type_ids")
"""How the names of buffers end that the code of models computes itself, whether a file holds them or not."""


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


def lower_case(tokenizer: Any) -> None:
    """Makes a tokenizer lower-case its input, if it does not yet (sentence-transformers' `dolower_case`)."""
    from tokenizers.normalizers import Lowercase, Sequence

    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *([normalizer] if normalizer else [])])

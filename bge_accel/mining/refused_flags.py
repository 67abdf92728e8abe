"""Flags of FlagEmbedding's mining that are not taken, each with what to do instead."""

from bge_accel.config import Refusal

_ICL = Refusal("in-context examples belong to decoders; only encoders are used here", ("{}{}", "None"))
REFUSED = {
    "devices": Refusal("choose by CUDA_VISIBLE_DEVICES; for several start with torchrun or `accelerate launch`", ("None",)),
    "embedder_model_class": Refusal(
        "only encoders are used here; of bge-m3 its dense vectors", ("encoder-only-base", "encoder-only-m3", "None")
    ),
    "examples_for_task": _ICL,
    "examples_instruction_format": _ICL,
}  # fmt: skip

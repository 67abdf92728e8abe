"""Small encoders with random weights."""

from pathlib import Path

import torch


def build_tiny_model(folder: Path, *, num_layers: int = 2, dropout: float = 0.1, seed: int = 0) -> str:
    """A BERT with random weights and a WordPiece tokenizer that knows letters, digits and a few CJK characters.

    Words are large and attention is strong, so that the first token's state, too, tells one text from another: as BERT
    begins, they would differ by rounding alone, and each processor would rank them in another way.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!:;'\"()-_=+*/<>[]{}#%&@\\的是一不了人我在有他"
    words = "the a of to in and is what who how did why king princess story return list string file value".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight *= 4
        for layer in model.encoder.layer:
            layer.attention.self.value.weight *= 10
            layer.attention.output.dense.weight *= 10
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def build(family, dtype=torch.float64, **settings):
    """An encoder's backbone of two layers with random weights, as its family's own code makes it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 40}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model(family, **(sizes | settings))
    return AutoModel.from_config(config, dtype=dtype).eval()


def padded(lengths, config, side="right"):
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(length) if side == "right" else slice(width - length, width)] = 1
    ids = torch.randint(5, 50, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, config.pad_token_id), "attention_mask": mask}

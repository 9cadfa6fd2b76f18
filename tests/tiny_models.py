"""Models small enough to build in a test: random weights, real architectures, no network."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VOCABULARY = """
question answer what is the of a color name number red green blue yellow apple river mountain
seven eight planet music iron gold silver paper table window garden horse
"""
WORDS = tuple(VOCABULARY.split())


def tiny_tokenizer(max_length: int = 64, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that knows a few words and can spell all others."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    digits = [str(digit) for digit in range(10)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", ".", ",", "?", *letters, *digits]
    pieces += ["##" + piece for piece in (*letters, *digits)] + list(words)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def tiny_config(vocabulary: int, layers: int = 3, max_length: int = 64) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_length,
        # Larger than BERT's own 0.02: texts then differ visibly without training.
        initializer_range=0.2,
    )


def tiny_encoder(folder: Path, layers: int = 3, seed: int = 0) -> Path:
    """Writes a randomly initialised BERT with its tokenizer; returns the folder."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(tiny_config(len(tokenizer), layers), add_pooling_layer=False)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder

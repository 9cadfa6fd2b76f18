"""The loss of a response: by hand, whatever the batch, the padding and the architecture."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertForMaskedLM, BertTokenizer

from airrep.examples import Example, InputError, Template, tokenize_examples
from airrep.lm import load_lm, response_losses
from airrep.weights import check_whole, fingerprint_weights, plain_weights, resolve_model
from tests import tiny_models
from tests.tiny_lm import save_tiny_lm

TEMPLATE = Template.parse("Q: {prompt}\nA: {response}<end>")
EXAMPLES = [
    Example("a", "What is two plus two?", "four"),
    Example("b", "Which colour is the grass in the garden of the house?", "green and blue"),
    Example("c", "", "yes"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model")


def test_losses_are_the_mean_cross_entropy_of_the_response(folder: Path) -> None:
    model, tokenizer = load_lm(folder)
    losses = response_losses(model, tokenize_examples(EXAMPLES, tokenizer, TEMPLATE, 100))
    for example, loss in zip(EXAMPLES, losses, strict=True):
        prompt = tokenizer(f"Q: {example.prompt}\nA: ", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{example.response}<end>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        expected = F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer))
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_losses_do_not_depend_on_the_batch(folder: Path) -> None:
    model, tokenizer = load_lm(folder)
    tokenized = tokenize_examples(EXAMPLES * 3, tokenizer, TEMPLATE, 100)
    together = response_losses(model, tokenized, batch_size=9)
    alone = response_losses(model, tokenized, batch_size=1)
    np.testing.assert_allclose(together, alone, rtol=2e-6)
    backwards = response_losses(model, tokenized[::-1], batch_size=4)[::-1]
    np.testing.assert_allclose(together, backwards, rtol=2e-6)


def test_the_model_is_left_as_it_was(folder: Path) -> None:
    model, tokenizer = load_lm(folder)
    ids = torch.tensor([tokenizer("The sky is blue")["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        response_losses(model, tokenize_examples(EXAMPLES, tokenizer, TEMPLATE, 100))
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a model folder: it has no config\.json"):
        resolve_model(tmp_path)
    with pytest.raises(InputError, match="is not a model"):
        resolve_model(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="package that is not installed; install it with"):
        resolve_model("package:no_such_package_at_all")
    with pytest.raises(InputError, match="holds 0 models"):
        resolve_model("package:pytest")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_lm(folder)
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_lm(tmp_path)
    with pytest.raises(InputError, match=r"has no \*\.safetensors file"):
        fingerprint_weights(tmp_path)


def test_fingerprint_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    same = save_tiny_lm(tmp_path / "same")
    other = save_tiny_lm(tmp_path / "other", seed=1)
    assert fingerprint_weights(same) == fingerprint_weights(folder)
    assert fingerprint_weights(other) != fingerprint_weights(folder)
    assert plain_weights(folder) == folder


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "chat_template.jinja",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ],
)
def test_fingerprint_follows_the_tokenizer(folder: Path, tmp_path: Path, name: str) -> None:
    model = copy_of(folder, tmp_path / "model")
    (model / "README.md").write_text("not of the model")
    assert fingerprint_weights(model) == fingerprint_weights(folder)
    (model / name).write_text("{}")
    assert fingerprint_weights(model) != fingerprint_weights(folder)


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def test_layers_without_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = copy_of(folder, tmp_path / "model")
    change_config(model, num_hidden_layers=6)
    with pytest.raises(
        InputError, match=r"model lacks 18 of its model's weights \(first: model\.layers\.4\."
    ):
        load_lm(model)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    bert = BertForMaskedLM(tiny_models.tiny_config(len(tokenizer)))
    bert.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"is not a causal language model \(BertLMHeadModel sees"):
        load_lm(tmp_path)
    change_config(tmp_path, is_decoder=True)
    load_lm(tmp_path)


def test_a_damaged_model_is_named(folder: Path, tmp_path: Path) -> None:
    model = copy_of(folder, tmp_path / "model")
    for name, content in (
        ("model.safetensors", (folder / "model.safetensors").read_bytes()[:-100]),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {}}'),
    ):
        (model / name).write_bytes(content)
        with pytest.raises(InputError, match="model cannot be loaded as a causal language model: "):
            load_lm(model)
        shutil.copy(folder / name, model / name)
    change_config(model, hidden_size=64)
    with pytest.raises(InputError, match="model cannot be loaded as a causal language model: "):
        load_lm(model)


def test_a_tokenizer_that_knows_no_word_is_refused(folder: Path) -> None:
    _, tokenizer = load_lm(folder)
    check_whole(folder, tokenizer, [])
    empty = BertTokenizer()  # what transformers makes of a BERT folder without tokenizer files
    with pytest.raises(InputError, match=r"has no tokenizer that knows a word; put .* beside its"):
        check_whole(folder, empty, [])


def test_only_a_missing_pooler_does_not_matter(folder: Path) -> None:
    _, tokenizer = load_lm(folder)
    check_whole(folder, tokenizer, ["pooler.dense.weight", "pooler.dense.bias"])
    with pytest.raises(
        InputError, match=r"lacks 1 of its model's weights \(first: layer\.weight\)"
    ):
        check_whole(folder, tokenizer, ["pooler.dense.weight", "layer.weight"])


def write_gguf(folder: Path, path: Path, layers: int) -> Path:
    """The tiny Llama of `folder`, which has 4 layers, as a GGUF file that claims `layers`."""
    gguf = pytest.importorskip("gguf")
    model, _ = load_lm(folder)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_has_all_its_layers_or_is_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = load_lm(write_gguf(folder, tmp_path / "whole.gguf", layers=4))
    assert model.config.num_hidden_layers == 4
    with pytest.raises(InputError, match=r"half\.gguf lacks 18 of its model's weights"):
        load_lm(write_gguf(folder, tmp_path / "half.gguf", layers=6))

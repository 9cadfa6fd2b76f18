"""The loss of a response: by hand, whatever the batch, the padding and the architecture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from airrep.examples import Example, InputError, Template, tokenize_examples
from airrep.lm import load_lm, response_losses
from airrep.weights import fingerprint_weights, plain_weights, resolve_model
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

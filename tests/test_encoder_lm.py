"""A causal language model as a text encoder: opened, padded, cut between its layers, trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_lm import write_gguf
from tiny_lm import save_tiny_lm
from training_task import planted_examples
from transformers import AutoModel, AutoTokenizer

from airrep.encoder import AirRepEncoder, add_lora, merge_lora
from airrep.examples import Example, InputError
from airrep.full_pool import FullPool
from airrep.lm import load_lm
from airrep.trunk import prepare_texts, trainable_parameters

EXAMPLES = planted_examples(12, seed=0)
LONG = Example("long", "apple " * 2000, "red")


@pytest.fixture
def encoder(tiny_lm: Path) -> AirRepEncoder:
    return AirRepEncoder.from_base(tiny_lm)


def test_embeddings_are_means_of_the_last_states(tiny_lm: Path, encoder: AirRepEncoder) -> None:
    model, tokenizer = AutoModel.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    embeddings = encoder.encode(EXAMPLES)  # in one padded batch
    for example, embedding in zip(EXAMPLES, embeddings, strict=True):
        text = f"Question: {example.prompt}\nAnswer: {example.response}"
        (tokens,) = encoder.tokenize([example])
        assert tokenizer.decode(tokens.ids) == text
        with torch.no_grad():
            states = model(torch.from_numpy(tokens.ids).long()[None]).last_hidden_state
        torch.testing.assert_close(embedding, states[0].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_no_padding_token_is_needed(encoder: AirRepEncoder) -> None:
    expected = encoder.encode(EXAMPLES, batch_size=1)
    encoder.tokenizer.pad_token = None
    torch.testing.assert_close(encoder.encode(EXAMPLES), expected, atol=1e-5, rtol=1e-4)


def test_round_trip_keeps_no_keys_and_values(encoder: AirRepEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    again = AirRepEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(EXAMPLES), encoder.encode(EXAMPLES))
    for one in (encoder, again):
        assert list(one.base(torch.tensor([[3, 4]]))) == ["last_hidden_state"]


def test_no_text_is_longer_than_the_positions_of_the_model(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_lm(tmp_path))
    tokenizer.model_max_length = 10**30  # so that the model alone says how long
    tokenizer.save_pretrained(str(tmp_path))
    encoder = AirRepEncoder.from_base(tmp_path, max_length=4096)
    assert encoder.max_length == len(encoder.tokenize([LONG])[0]) == 512
    assert torch.isfinite(encoder.encode([LONG])).all()


@pytest.mark.parametrize("trainable_layers", [None, 4, 1, 0])
def test_frozen_layers_change_no_gradient(encoder: AirRepEncoder, trainable_layers: int) -> None:
    parameters = trainable_parameters(encoder, trainable_layers)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in parameters)
    expected = encoder(*encoder.pad(encoder.tokenize(EXAMPLES)))
    expected.square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    encoder.zero_grad()
    texts = prepare_texts(encoder, encoder.tokenize(EXAMPLES), trainable_layers, 50)
    pool = FullPool(texts, list(parameters.values()), Accelerator(cpu=True), 50, 10**9)
    rows = np.arange(len(EXAMPLES))
    loss = pool.backward(rows, lambda embeddings: embeddings.square().sum())
    assert loss == pytest.approx(float(expected.detach().square().sum()), rel=1e-4)
    for name, parameter in parameters.items():
        scale = float(plain[name].abs().max())
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-4 * scale)


def test_adapters_go_on_and_come_off(encoder: AirRepEncoder) -> None:
    expected, names = encoder.encode(EXAMPLES), encoder.state_dict().keys()
    add_lora(encoder, rank=2, seed=0)
    torch.testing.assert_close(encoder.encode(EXAMPLES), expected)
    merge_lora(encoder)
    assert encoder.state_dict().keys() == names


def test_a_gguf_file_is_converted(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRREP_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tiny_lm, tmp_path / "tiny.gguf", layers=4)
    encoder, (model, _) = AirRepEncoder.from_base(file), load_lm(file)
    (tokens,) = encoder.tokenize(EXAMPLES[:1])
    with torch.no_grad():
        ids = torch.from_numpy(tokens.ids).long()[None]
        states = model(ids, output_hidden_states=True).hidden_states[-1]
    expected = states.mean(dim=1)
    torch.testing.assert_close(encoder.encode(EXAMPLES[:1]), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"absent\.gguf is not a model"):
        AirRepEncoder.from_base(tmp_path / "absent.gguf")


def test_bf16_comes_near_to_float32(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm", hidden=64)
    whole = AirRepEncoder.from_base(folder)
    half = AirRepEncoder.from_base(folder, dtype=torch.bfloat16)
    assert half.base.dtype == torch.bfloat16
    expected, found = whole.encode([*EXAMPLES, LONG]), half.encode([*EXAMPLES, LONG])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()

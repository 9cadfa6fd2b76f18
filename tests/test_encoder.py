"""The encoder opens any text encoder and published checkpoints, and encodes the same everywhere."""

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_encoder, tiny_tokenizer
from transformers import (
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from airrep.encoder import AirRepEncoder, add_lora, merge_lora
from airrep.examples import Example, InputError
from airrep.marks import WIDTH, marks

EXAMPLES = [
    Example(str(row), "what is the color of " + "apple " * row, "red " * (row % 3 + 1))
    for row in range(11)
]


@pytest.fixture
def encoder(base: Path) -> AirRepEncoder:
    return AirRepEncoder.from_base(base)


def test_untrained_embeddings_are_the_mean_pooled_base(base: Path, encoder: AirRepEncoder) -> None:
    model = BertModel.from_pretrained(base, add_pooling_layer=False)
    text = "Question: what is the color of apple apple \nAnswer: red red red "
    inputs = tiny_tokenizer()(text, return_tensors="pt")
    states = model(inputs["input_ids"]).last_hidden_state
    torch.testing.assert_close(encoder.encode(EXAMPLES[2:3]), states.mean(dim=1).detach())


def test_response_words_are_added(base: Path, encoder: AirRepEncoder, tmp_path: Path) -> None:
    text = torch.nn.functional.rms_norm(encoder.encode(EXAMPLES), (32,))
    encoder.add_response_words(with_marks=False)
    torch.testing.assert_close(encoder.encode(EXAMPLES), text)  # no words yet
    table = BertModel.from_pretrained(base, add_pooling_layer=False).embeddings.word_embeddings
    assert encoder.words_projector is not None
    weight = torch.nn.init.normal_(encoder.words_projector.weight).detach()
    for row in (0, 2):  # "red" once and three times; neither the prompt nor [SEP] is read
        (word,) = encoder.tokenizer("red", add_special_tokens=False)["input_ids"]
        normed = torch.nn.functional.layer_norm(table.weight[word].detach(), (32,))
        normed /= normed.square().mean().sqrt()
        added = encoder.encode(EXAMPLES[row : row + 1]) - text[row]
        torch.testing.assert_close(added[0], weight @ normed, atol=1e-5, rtol=1e-4)
    expected = encoder.encode(EXAMPLES)
    torch.testing.assert_close(encoder.encode(EXAMPLES, batch_size=2), expected)
    encoder.save_pretrained(tmp_path)
    again = AirRepEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(EXAMPLES), expected)
    ids, mask, response = again.pad(again.tokenize(EXAMPLES))
    torch.testing.assert_close(again(ids, mask, response), expected)
    with pytest.raises(InputError, match="reads the response's words; give response_mask"):
        again(ids, mask)


def test_marks_come_with_the_response_words(encoder: AirRepEncoder, tmp_path: Path) -> None:
    encoder.add_response_words()
    (text,) = encoder.tokenize([Example("x", "apple", "red")])
    (apple,) = encoder.tokenizer("apple", add_special_tokens=False)["input_ids"]
    assert text.ids[encoder.config.prompt_start] == apple
    ids, _, response = encoder.pad(encoder.tokenize(EXAMPLES))
    words = encoder.pool_words(ids, response)
    assert words is not None
    assert words.shape == (len(EXAMPLES), 32 + WIDTH)
    own = marks(ids, response, encoder.config.prompt_start)
    torch.testing.assert_close(words[:, 32:] / words[0, 32].abs(), own)
    torch.testing.assert_close(words[:, 32:].norm(dim=1), words[:, :32].norm(dim=1))
    assert encoder.words_projector is not None
    torch.nn.init.normal_(encoder.words_projector.weight, std=0.1)
    encoder.save_pretrained(tmp_path)
    again = AirRepEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(EXAMPLES), encoder.encode(EXAMPLES))
    encoder.tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer"):
        encoder.add_response_words()


def test_encoders_of_one_base_share_its_means(base: Path, encoder: AirRepEncoder) -> None:
    encoder.add_response_words()
    assert encoder.words_projector is not None
    torch.nn.init.normal_(encoder.words_projector.weight, std=0.1)
    # The same text, of which another part is the response.
    split = Example("split", EXAMPLES[2].prompt, "red red\nAnswer: red")
    moved = Example("moved", EXAMPLES[2].prompt + "\nAnswer: red red", "red")
    texts = [*EXAMPLES, split, moved, EXAMPLES[0]]
    expected = encoder.encode(texts)
    encoder.means = {}
    torch.testing.assert_close(encoder.encode(EXAMPLES[:6], batch_size=4), expected[:6])
    torch.testing.assert_close(encoder.encode(texts, batch_size=5), expected)
    assert len(encoder.means) == len({text.ids.tobytes() for text in encoder.tokenize(texts)})
    other = AirRepEncoder.from_base(base)
    other.means = encoder.means
    other.base.forward = None  # not called again
    half = AirRepEncoder.from_base(base, dtype=torch.bfloat16)
    half.means = encoder.means
    assert half.encode(EXAMPLES).isfinite().all()  # of its own precision
    torch.testing.assert_close(
        other.encode(EXAMPLES), AirRepEncoder.from_base(base).encode(EXAMPLES)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_size_and_order_change_nothing(encoder: AirRepEncoder, batch_size: int) -> None:
    expected = encoder.encode(EXAMPLES)
    assert (expected.dtype, expected.shape) == (torch.float32, (len(EXAMPLES), 32))
    assert (encoder.encode(EXAMPLES, batch_size=batch_size) - expected).abs().max() < 1e-5
    backwards = encoder.encode(EXAMPLES[::-1], batch_size=batch_size)
    assert (backwards.flip(0) - expected).abs().max() < 1e-5


def test_encode_leaves_the_mode_as_it_was(encoder: AirRepEncoder) -> None:
    expected = encoder.encode(EXAMPLES)
    encoder.train()
    encoder.base.embeddings.eval()
    assert torch.equal(encoder.encode(EXAMPLES), expected)  # without dropout
    assert encoder.training
    assert encoder.base.encoder.training
    assert not encoder.base.embeddings.training
    assert encoder.encode([]).shape == (0, 32)


def test_similarity_is_the_dot_product(encoder: AirRepEncoder) -> None:
    scores = encoder.similarity(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert scores.tolist() == [[11.0, 2.0]]


def test_round_trip(encoder: AirRepEncoder, tmp_path: Path) -> None:
    torch.nn.init.normal_(encoder.projector.weight)
    encoder.save_pretrained(tmp_path)
    again = AirRepEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(EXAMPLES), encoder.encode(EXAMPLES))
    assert again.max_length == encoder.max_length == 64
    assert not again.training
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_precision_is_the_callers(base: Path, tmp_path: Path) -> None:
    encoder = AirRepEncoder.from_base(base)
    encoder.add_response_words()
    encoder.bfloat16().save_pretrained(tmp_path)
    for arguments in ({}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}):
        again = AirRepEncoder.from_pretrained(tmp_path, **arguments)
        expected = {arguments.get("dtype", torch.float32)}
        assert {parameter.dtype for parameter in again.parameters()} == expected
        assert again.encode(EXAMPLES).isfinite().all()


def test_untrained_adapters_change_nothing_and_come_off(encoder: AirRepEncoder) -> None:
    expected, names = encoder.encode(EXAMPLES), encoder.state_dict().keys()
    state = torch.get_rng_state()
    add_lora(encoder, rank=2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    adapters = {
        name: parameter for name, parameter in encoder.named_parameters() if "lora_" in name
    }
    assert len(adapters) == 2 * 6 * 3  # two matrices for each of six linear layers in three layers
    torch.testing.assert_close(encoder.encode(EXAMPLES), expected)
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    changed = encoder.encode(EXAMPLES)
    assert (changed - expected).abs().max() > 0.01
    merge_lora(encoder)
    assert encoder.state_dict().keys() == names
    torch.testing.assert_close(encoder.encode(EXAMPLES), changed, atol=1e-5, rtol=1e-4)


def test_a_base_without_linear_layers_takes_no_adapters(tmp_path: Path) -> None:
    encoder = AirRepEncoder.from_base(tiny_encoder(tmp_path, layers=0))
    with pytest.raises(InputError, match=r"LoRA cannot be put on BertModel .* leave lora_rank out"):
        add_lora(encoder, rank=2, seed=0)


def test_reads_the_published_checkpoints(encoder: AirRepEncoder, tmp_path: Path) -> None:
    """A flat BERT's config; weights named bert.* and projector.*, some of them bf16."""
    weights = {
        name.replace("base.", "bert.", 1): tensor for name, tensor in encoder.state_dict().items()
    }
    weights["projector.weight"] = torch.randn(32, 32).bfloat16()
    weights["projector.bias"] = torch.randn(32).bfloat16()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(len(encoder.tokenizer)).to_dict()
    config |= {"model_type": "airrep", "architectures": ["AirRepModel"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder.tokenizer.save_pretrained(str(tmp_path))

    published = AirRepEncoder.from_pretrained(tmp_path)
    pooled = encoder.encode(EXAMPLES)
    expected = pooled @ weights["projector.weight"].float().T + weights["projector.bias"].float()
    torch.testing.assert_close(published.encode(EXAMPLES), expected)
    assert published.max_length == 64
    published.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        AirRepEncoder.from_pretrained(tmp_path / "ours").encode(EXAMPLES),
        published.encode(EXAMPLES),
    )


def test_a_long_text_is_cut_by_the_one_rule(base: Path) -> None:
    encoder = AirRepEncoder.from_base(base, max_length=24)
    long = Example("long", "apple " * 500, "green")
    (tokens,) = encoder.tokenize([long])
    assert len(tokens) == 24
    assert encoder.tokenizer.decode(tokens.ids[tokens.response_start :]) == "green [SEP]"
    # The base reads 64 positions, so asking for more gets 64.
    assert len(AirRepEncoder.from_base(base, max_length=512).tokenize([long])[0]) == 64


def test_other_architectures(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(max_length=10**30)
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    distil = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **shape)
    roberta = RobertaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        **shape,
    )
    deberta = DebertaV2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **shape
    )
    models = [DistilBertModel(distil), RobertaModel(roberta), DebertaV2Model(deberta)]
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    for model, length in zip([*models, T5Model(t5)], [40, 39, 40, 512], strict=True):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        encoder = AirRepEncoder.from_base(folder)
        encoder.add_response_words()
        torch.nn.init.normal_(encoder.words_projector.weight)
        assert encoder.max_length == length
        embeddings = encoder.encode([*EXAMPLES, Example("long", "apple " * 99, "red")])
        encoder.save_pretrained(folder / "ours")
        again = AirRepEncoder.from_pretrained(folder / "ours")
        torch.testing.assert_close(again.encode(EXAMPLES), embeddings[: len(EXAMPLES)])


def test_weights_are_only_ever_read_from_safetensors(base: Path, tmp_path: Path) -> None:
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be opened as an encoder"):
        AirRepEncoder.from_base(tmp_path)


def test_a_base_from_a_package_that_is_not_installed() -> None:
    with pytest.raises(InputError, match="no_such_package"):
        AirRepEncoder.from_base("package:no_such_package")


def test_a_folder_that_is_no_encoder(base: Path, encoder: AirRepEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        AirRepEncoder.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    for opener in (AirRepEncoder.from_pretrained, AirRepEncoder.from_base):
        with pytest.raises(InputError, match=r"no config.json.*it holds notes.txt"):
            opener(tmp_path)
    with pytest.raises(InputError, match="type 'bert', not an AirRep encoder"):
        AirRepEncoder.from_pretrained(base)
    encoder.save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="is an AirRep encoder already"):
        AirRepEncoder.from_base(tmp_path / "ours")


def test_damaged_weights(encoder: AirRepEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "projector.bias"},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"lacks 1 of .* weights \(first: projector.bias\)"):
        AirRepEncoder.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be opened as an encoder"):
        AirRepEncoder.from_pretrained(tmp_path)


def test_layers_without_weights_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(InputError, match=r"base lacks 32 of .*first: encoder\.layer\.3\."):
        AirRepEncoder.from_base(tmp_path / "base")


def test_an_encoder_without_a_tokenizer_is_refused(
    base: Path, encoder: AirRepEncoder, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    encoder.save_pretrained(tmp_path / "trained")
    for path in tmp_path.glob("*/tokenizer*"):
        path.unlink()
    for opener, name in (
        (AirRepEncoder.from_base, "base"),
        (AirRepEncoder.from_pretrained, "trained"),
    ):
        with pytest.raises(InputError, match=f"{name} has no tokenizer that knows a word"):
            opener(tmp_path / name)


def test_damaged_text_files(base: Path, encoder: AirRepEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "trained")
    shutil.copytree(base, tmp_path / "base")
    for name in ("config.json", "tokenizer.json"):
        for opener, folder in (
            (AirRepEncoder.from_base, tmp_path / "base"),
            (AirRepEncoder.from_pretrained, tmp_path / "trained"),
        ):
            whole = (folder / name).read_bytes()
            for content in (b"[]", b"null", b"{", b'{"added_tokens": [], "model": {}}'):
                (folder / name).write_bytes(content)
                with pytest.raises(InputError, match=r"cannot be opened|not an AirRep encoder"):
                    opener(folder)
            (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("limit", "weights"), [(1000, True), (20_000, True), (3000, False)]
)  # full at the config, the weights, the tokenizer
def test_a_full_disk_is_an_os_error(
    encoder: AirRepEncoder, tmp_path: Path, monkeypatch: Any, limit: int, weights: bool
) -> None:
    if not weights:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failure:
            encoder.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (failure.value.errno, failure.value.filename) == (errno.EFBIG, str(tmp_path))


def test_remote_code_is_not_run(base: Path, tmp_path: Path) -> None:
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(InputError, match="cannot be opened as an encoder"):
        AirRepEncoder.from_base(tmp_path)

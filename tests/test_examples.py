"""Examples as text and tokens: templates, the truncation rule, padding, fingerprints."""

from typing import Any

import numpy as np
import pytest
import tiny_lm
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from airrep.examples import (
    ENCODER_TEMPLATE,
    Example,
    InputError,
    Template,
    TokenizedExample,
    encoder_text,
    fingerprint_examples,
    length_sorted_batches,
    lm_template,
    pad,
    tokenize_examples,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
)
TOKENIZER = tiny_lm.tiny_tokenizer()
TEMPLATE = Template.parse("Q: {prompt}\nA: {response}<end>")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def framed_tokenizer(chat_template: str | None = None) -> Any:
    """A tokenizer that puts "<pad>" before and "<end>" after every text."""
    tokenizer = tiny_lm.tiny_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <end>",
        special_tokens=[("<pad>", tokenizer.pad_token_id), ("<end>", tokenizer.eos_token_id)],
    )
    return tokenizer


# Templates


def test_a_template_is_taken_apart_and_put_together() -> None:
    template = Template.parse(ENCODER_TEMPLATE)
    assert template == Template("Question: ", "\nAnswer: ", "")
    assert template.text == ENCODER_TEMPLATE
    assert encoder_text(Example("a", "p {x}", "r")) == "Question: p {x}\nAnswer: r"


@pytest.mark.parametrize("text", ["", "{prompt}", "{response} {prompt}"])
def test_a_template_needs_prompt_then_response(text: str) -> None:
    with pytest.raises(InputError, match=r"needs \{prompt\} and then \{response\}"):
        Template.parse(text)


def test_lm_template_without_a_chat_template() -> None:
    assert lm_template(TOKENIZER) == Template("", "\n", "<end>")


def test_lm_template_given() -> None:
    assert lm_template(TOKENIZER, "{prompt} -> {response}") == Template("", " -> ", "")


def test_lm_template_of_chatml() -> None:
    assert lm_template(tiny_lm.tiny_tokenizer(CHATML)) == Template(
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    )


def test_lm_template_keeps_a_system_turn_that_the_chat_template_adds() -> None:
    found = lm_template(tiny_lm.tiny_tokenizer(SYSTEM + CHATML))
    assert found.before == "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n"


def test_special_tokens_come_once() -> None:
    assert lm_template(framed_tokenizer()) == Template("", "\n", "")
    chat = framed_tokenizer("<pad>{% for m in messages %}{{ m.content }}|{% endfor %}<end>")
    template = lm_template(chat)
    assert template == Template("", "|", "|")
    [tokenized] = tokenize_examples([Example("a", "p", "r")], chat, template, 64)
    assert chat.decode(tokenized.ids) == "<pad>p|r|<end>"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "does not keep the two turns",
        ),
        ("{{ raise_exception('no user turns') }}", r"refuses .* \(no user turns\)"),
    ],
)
def test_a_chat_template_of_no_use_is_refused(chat_template: str, message: str) -> None:
    with pytest.raises(InputError, match=message + ".*explicit template"):
        lm_template(tiny_lm.tiny_tokenizer(chat_template))


# Tokens and truncation


def test_an_example_that_fits_is_whole() -> None:
    example = Example("a", "the sky", "blue")
    [tokenized] = tokenize_examples([example], TOKENIZER, TEMPLATE, 64)
    assert TOKENIZER.decode(tokenized.ids) == "Q: the sky\nA: blue<end>"
    assert TOKENIZER.decode(tokenized.ids[tokenized.response_start :]) == "blue<end>"


def test_special_tokens_are_counted_and_kept() -> None:
    tokenizer = framed_tokenizer()
    [tokenized] = tokenize_examples([Example("a", "sky " * 50, "blue")], tokenizer, TEMPLATE, 30)
    assert len(tokenized) == 30
    assert (tokenized.ids[0], tokenized.ids[-1]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


# Spaces at the ends would merge with the template's own tokens.
TEXT = st.text("abc 12\né", min_size=1, max_size=120).map(lambda text: f"x{text}x")


@given(prompt=TEXT, response=TEXT, max_length=st.integers(16, 90))
def test_truncation_rule(prompt: str, response: str, max_length: int) -> None:
    """The response is whole if it fits; the prompt keeps its head and its tail."""
    example = Example("a", prompt, response)
    [tokenized] = tokenize_examples([example], TOKENIZER, TEMPLATE, max_length)
    whole_prompt = ids_of(TEMPLATE.before + prompt + TEMPLATE.between)
    whole_response = ids_of(response + TEMPLATE.after)
    kept_prompt = tokenized.ids[: tokenized.response_start].tolist()
    kept_response = tokenized.ids[tokenized.response_start :].tolist()
    between = len(ids_of(TEMPLATE.between))

    assert len(tokenized) == min(max_length, len(kept_prompt) + len(kept_response))
    assert kept_response == whole_response[: max_length - between]
    if len(whole_prompt) + len(whole_response) <= max_length:
        assert kept_prompt == whole_prompt
    else:
        assert len(tokenized) == max_length
        tail = max(between, len(kept_prompt) // 2)
        head = len(kept_prompt) - tail
        assert kept_prompt[:head] == whole_prompt[:head]
        assert kept_prompt[head:] == whole_prompt[-tail:]


@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=5))
def test_an_example_has_the_same_tokens_alone_and_in_any_company(
    texts: list[tuple[str, str]],
) -> None:
    examples = [Example(str(row), *pair) for row, pair in enumerate(texts)]
    together = tokenize_examples(examples, TOKENIZER, TEMPLATE, 40)
    for example, tokenized in zip(examples, together, strict=True):
        [alone] = tokenize_examples([example], TOKENIZER, TEMPLATE, 40)
        np.testing.assert_array_equal(alone.ids, tokenized.ids)
        assert alone.response_start == tokenized.response_start


def test_no_examples_give_no_tokens() -> None:
    assert tokenize_examples([], TOKENIZER, TEMPLATE, 64) == []


def test_a_length_without_room_is_refused_and_the_least_named() -> None:
    example = Example("a", "p", "r")
    least = len(ids_of(TEMPLATE.between)) + 8
    with pytest.raises(InputError, match=f"max_length is 3, .* give at least {least}"):
        tokenize_examples([example], TOKENIZER, TEMPLATE, 3)
    assert tokenize_examples([example], TOKENIZER, TEMPLATE, least)


@pytest.mark.parametrize("response", ["", " \n"])
def test_an_empty_response_is_refused(response: str) -> None:
    with pytest.raises(InputError, match="Example 'a' has an empty response"):
        tokenize_examples([Example("a", "p", response)], TOKENIZER, TEMPLATE, 64)


# Batches


def test_pad_fills_the_right_side() -> None:
    batch = [
        TokenizedExample(np.asarray([5, 6, 7], dtype=np.int32), 1),
        TokenizedExample(np.asarray([8], dtype=np.int32), 0),
    ]
    ids, mask = pad(batch, pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert (str(ids.dtype), str(mask.dtype)) == ("torch.int64", "torch.bool")


@given(lengths=st.lists(st.integers(1, 9), max_size=20), batch_size=st.integers(1, 6))
def test_length_sorted_batches_hold_every_row_once_longest_first(
    lengths: list[int], batch_size: int
) -> None:
    batches = length_sorted_batches(lengths, batch_size)
    rows = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(1 <= len(batch) <= batch_size for batch in batches)


# Fingerprints


def test_fingerprint_stays_the_same_between_versions() -> None:
    """Stores on disk carry this hash: another value would refuse all of them."""
    examples = [Example("a", "pé", "r", "task", {"x": 1}), Example("b", "q", "s")]
    assert fingerprint_examples(examples) == (
        "7cc8a8217e67c06bd66b67f6c66608e788097f960050d22f1337815e812652b6"
    )


def test_fingerprint_sees_content_and_order_but_not_task_or_meta() -> None:
    one, two = Example("a", "p", "r"), Example("b", "q", "s")
    known = fingerprint_examples([one, two])
    assert known == fingerprint_examples(iter([Example("a", "p", "r", "t", {"m": 1}), two]))
    assert known != fingerprint_examples([two, one])
    assert known != fingerprint_examples([one, Example("b", "q", "s.")])
    assert known != fingerprint_examples([one, Example("b", "qs", "")])
    assert known != fingerprint_examples([one])

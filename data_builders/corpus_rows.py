"""The cases of every demo task, from facts or rules: what is asked and what is right.

Each function here lists the rows of one task, in a fixed order.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

from data_builders.corpus_facts import CONTINENTS, Facts
from data_builders.corpus_words import UNIT_PAIRS, UNITS_BY_QUANTITY

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# A rule has endless cases; this many of each are enough for any corpus we make.
RULE_CASES = 2_000
Case = TypeVar("Case")


class Row(NamedTuple):
    """One case of a task. Tasks of one table that share a key state the same fact."""

    key: str
    slots: tuple[str, ...]
    answer: str


def _sample(cases: Iterable[Case], count: int = RULE_CASES) -> list[Case]:
    """At most `count` of the cases, drawn the same way every time, in their order."""
    listed = list(cases)
    if len(listed) <= count:
        return listed
    chosen = np.random.default_rng(count).choice(len(listed), count, replace=False)
    return [listed[i] for i in sorted(chosen)]


# -- countries ----------------------------------------------------------------------------------


def capitals(facts: Facts) -> Iterator[Row]:
    for country in facts.countries:
        if country.capital:
            yield Row(country.code, (country.in_text,), country.capital)


def capital_countries(facts: Facts) -> Iterator[Row]:
    for country in facts.countries:
        if country.capital:
            yield Row(country.code, (country.capital,), country.name)


def _choices(questions: list[tuple[str, str, str]]) -> Iterator[Row]:
    """Rows with options A, B and C from (key, question, right answer)."""
    rng = np.random.default_rng(len(questions))
    for number, (key, question, right) in enumerate(questions):
        others = rng.choice(len(questions) - 1, 2, replace=False)
        wrong = [questions[i + (i >= number)][2] for i in others]
        position = int(rng.integers(3))
        options = [*wrong[:position], right, *wrong[position:]]
        yield Row(key, (question, *options), "ABC"[position])


def capital_choices(facts: Facts) -> Iterator[Row]:
    return _choices([(c.code, c.in_text, c.capital) for c in facts.countries if c.capital])


def cities(facts: Facts) -> Iterator[Row]:
    for city, country in facts.cities:
        yield Row(city, (city,), country.name)


def continents(facts: Facts) -> Iterator[Row]:
    for country in facts.countries:
        if country.continent:
            yield Row(country.code, (country.in_text,), country.continent)


def in_continent(facts: Facts) -> Iterator[Row]:
    rng = np.random.default_rng(len(facts.countries))
    for country in facts.countries:
        if country.continent:
            others = [name for name in CONTINENTS.values() if name != country.continent]
            other = others[int(rng.integers(len(others)))]
            for name, answer in ((country.continent, "yes"), (other, "no")):
                yield Row(f"{country.code}/{name}", (country.in_text, name), answer)


def more_people(facts: Facts) -> Iterator[Row]:
    # Twice as many people: no census will turn the answer round.
    pairs = [
        (small, large)
        for one, two in combinations(facts.countries, 2)
        for small, large in [sorted((one, two), key=lambda country: country.population)]
        if large.population > 2 * small.population
    ]
    for number, (small, large) in enumerate(_sample(pairs)):
        first, second = (large, small) if number % 2 else (small, large)
        answer = "true" if first is large else "false"
        yield Row(f"{first.code}/{second.code}", (first.in_text, second.in_text), answer)


def currencies(facts: Facts) -> Iterator[Row]:
    for country, currency in facts.currencies:
        yield Row(country.code, (country.in_text,), currency)


def codes(facts: Facts) -> Iterator[Row]:
    for country in facts.countries:
        yield Row(country.code, (country.in_text,), country.code)


# -- names in other languages -------------------------------------------------------------------


def country_names(language: str) -> Callable[[Facts], Iterator[Row]]:
    def rows(facts: Facts) -> Iterator[Row]:
        for country, name in facts.country_names(language):
            yield Row(country.code, (country.in_text,), name)

    return rows


def endonyms(facts: Facts) -> Iterator[Row]:
    for english, own in facts.endonyms:
        yield Row(english, (english,), own)


def months(facts: Facts) -> Iterator[Row]:
    for month, language, name in facts.months:
        yield Row(f"{language}/{month}", (month, language), name)


# -- numbers ------------------------------------------------------------------------------------


def number_words(language: str, last: int) -> Callable[[Facts], Iterator[Row]]:
    def rows(facts: Facts) -> Iterator[Row]:
        for number in range(1, last + 1):
            yield Row(str(number), (str(number),), facts.number_words(number, language))

    return rows


def words_to_number(facts: Facts) -> Iterator[Row]:
    for key, (number,), words in number_words("en", 500)(facts):
        yield Row(key, (words,), number)


def ordinals(facts: Facts) -> Iterator[Row]:
    for number in range(1, 1001):
        yield Row(str(number), (str(number),), facts.english.ordinal(number))


def roman(facts: Facts) -> Iterator[Row]:
    for number in range(1, 201):
        yield Row(str(number), (str(number),), roman_numeral(number))


def roman_numeral(number: int) -> str:
    """`number` (1 to 399) in roman numerals."""
    values = (100, 90, 50, 40, 10, 9, 5, 4, 1)
    numerals = ("C", "XC", "L", "XL", "X", "IX", "V", "IV", "I")
    written = ""
    for value, numeral in zip(values, numerals, strict=True):
        count, number = divmod(number, value)
        written += numeral * count
    return written


# -- arithmetic ---------------------------------------------------------------------------------


def additions(facts: Facts) -> Iterator[Row]:
    for a, b in _sample((a, b) for a in range(2, 100) for b in range(2, 100)):
        yield Row(f"{a}+{b}", (str(a), str(b)), str(a + b))


def subtractions(facts: Facts) -> Iterator[Row]:
    for b, a in _sample(combinations(range(2, 100), 2)):
        yield Row(f"{a}-{b}", (str(a), str(b)), str(a - b))


def multiplications(facts: Facts) -> Iterator[Row]:
    for a, b in _sample((a, b) for a in range(2, 21) for b in range(2, 21)):
        yield Row(f"{a}*{b}", (str(a), str(b)), str(a * b))


def larger_numbers(facts: Facts) -> Iterator[Row]:
    pairs = ((a, b) for a in range(10, 200) for b in range(10, 200) if a != b)
    for a, b in _sample(pairs):
        yield Row(f"{a}/{b}", (str(a), str(b)), str(max(a, b)))


def even_odd(facts: Facts) -> Iterator[Row]:
    for number in range(1, 1001):
        yield Row(str(number), (str(number),), "odd" if number % 2 else "even")


def primes(facts: Facts) -> Iterator[Row]:
    primes = [n for n in range(2, 400) if all(n % d for d in range(2, n))]
    others = _sample((n for n in range(4, 400) if n not in primes), len(primes))
    for number in sorted(primes + others):
        yield Row(str(number), (str(number),), "yes" if number in primes else "no")


# -- words --------------------------------------------------------------------------------------


def plurals(facts: Facts) -> Iterator[Row]:
    for noun in facts.nouns:
        yield Row(noun, (noun,), facts.english.plural_noun(noun))


def singulars(facts: Facts) -> Iterator[Row]:
    for noun in facts.nouns:
        yield Row(noun, (facts.english.plural_noun(noun),), noun)


def articles(facts: Facts) -> Iterator[Row]:
    articles = {noun: facts.english.a(noun).split()[0] for noun in facts.nouns}
    an = [noun for noun in facts.nouns if articles[noun] == "an"]
    # As many of either, and all whose first letter misleads ("a university").
    misleading = [n for n in facts.nouns if articles[n] == "a" and n[0] in "aeiou"]
    plain = (n for n in facts.nouns if articles[n] == "a" and n[0] not in "aeiou")
    a = misleading + _sample(plain, len(an) - len(misleading))
    for noun in sorted(an + a):
        yield Row(noun, (noun,), articles[noun])


def spelling(change: Callable[[str], str]) -> Callable[[Facts], Iterator[Row]]:
    def rows(facts: Facts) -> Iterator[Row]:
        for word in facts.words:
            yield Row(word, (word,), change(word))

    return rows


def count_vowels(word: str) -> str:
    return str(sum(letter in "aeiou" for letter in word))


def sorted_words(facts: Facts) -> Iterator[Row]:
    rng = np.random.default_rng(len(facts.nouns))
    for _ in range(RULE_CASES):
        words = [facts.nouns[i] for i in rng.choice(len(facts.nouns), 3, replace=False)]
        yield Row(" ".join(words), tuple(words), " ".join(sorted(words)))


def days_after(facts: Facts) -> Iterator[Row]:
    for start, weekday in enumerate(WEEKDAYS):
        for days in range(2, 31):
            yield Row(f"{weekday}+{days}", (str(days), weekday), WEEKDAYS[(start + days) % 7])


# -- elements and units -------------------------------------------------------------------------


def symbols(facts: Facts) -> Iterator[Row]:
    for element in facts.elements:
        yield Row(element.symbol, (element.name,), element.symbol)


def symbol_elements(facts: Facts) -> Iterator[Row]:
    for element in facts.elements:
        yield Row(element.symbol, (element.symbol,), element.name)


def symbol_choices(facts: Facts) -> Iterator[Row]:
    return _choices([(e.symbol, e.name, e.symbol) for e in facts.elements])


def atomic_numbers(facts: Facts) -> Iterator[Row]:
    for element in facts.elements:
        yield Row(element.symbol, (element.name,), str(element.number))


def metals(facts: Facts) -> Iterator[Row]:
    for element in facts.elements:
        if element.kind:
            yield Row(element.symbol, (element.name,), element.kind)


def conversions(facts: Facts) -> Iterator[Row]:
    plural = facts.english.plural_noun
    for unit, smaller in UNIT_PAIRS:
        factor = facts.factor(unit, smaller)
        for count in range(2, 21):
            slots = (str(count), plural(unit), plural(smaller))
            yield Row(f"{count} {unit}/{smaller}", slots, str(count * factor))


def quantities(facts: Facts) -> Iterator[Row]:
    for quantity, names in UNITS_BY_QUANTITY.items():
        units = names.split()
        for unit in units:
            assert facts.same_quantity(unit, units[0]), f"{unit} does not measure {quantity}"
            yield Row(unit, (unit.replace("_", " "),), quantity)

"""The tasks of the demo corpus: what each asks, in which wordings, about which facts.

Tasks come in families that share facts, answer formats or both, so that training on one task
helps or harms another: capitals are asked in both directions, digits and number words are
asked both ways, yes/no and A/B/C answers recur in unrelated families.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from data_builders import corpus_rows as rows
from data_builders.corpus_facts import Facts


@dataclass(frozen=True)
class Item:
    """One question and its answer: `slots` fill any of the task's wordings."""

    fact: str
    slots: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Task:
    """A task: `cases` lists them from facts, `wordings` are format strings of the slots."""

    name: str
    family: str
    table: str
    wordings: tuple[str, ...]
    cases: Callable[[Facts], Iterable[rows.Row]]


@cache
def task_items(name: str) -> tuple[Item, ...]:
    """All cases of a task, one a fact and one a question, in a fixed order."""
    task = TASKS[name]
    seen: set[str] = set()
    asked: set[tuple[str, ...]] = set()
    items = []
    for row in task.cases(_facts()):
        if row.key not in seen and row.slots not in asked:
            items.append(Item(f"{task.table}/{row.key}", row.slots, row.answer))
        seen.add(row.key)
        asked.add(row.slots)
    return tuple(items)


@cache
def _facts() -> Facts:
    return Facts()


def _task(
    family: str,
    name: str,
    cases: Callable[[Facts], Iterable[rows.Row]],
    *wordings: str,
    table: str | None = None,
) -> Task:
    return Task(name, family, table or name, wordings, cases)


_OPTIONS = "A) {1} B) {2} C) {3}"

# Every task by its name. A wording must not read as another task's.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "capitals", "country_capital", rows.capitals,
            "What is the capital of {0}?",
            "Name the capital city of {0}.",
            "Complete: The capital of {0} is",
            table="capital",
        ),
        _task(
            "capitals", "capital_country", rows.capital_countries,
            "{0} is the capital of which country?",
            "Which country has {0} as its capital?",
            "Complete: {0} is the capital city of",
            table="capital",
        ),
        _task(
            "capitals", "capital_choice", rows.capital_choices,
            "Which city is the capital of {0}? " + _OPTIONS,
            "Choose the capital of {0}. " + _OPTIONS,
            table="capital",
        ),
        _task(
            "countries", "city_country", rows.cities,
            "In which country is the city of {0}?",
            "Name the country where {0} lies.",
            "The city {0} is in which country?",
        ),
        _task(
            "countries", "country_continent", rows.continents,
            "Which continent is {0} in?",
            "Name the continent of {0}.",
            "On what continent would you find {0}?",
        ),
        _task(
            "countries", "in_continent", rows.in_continent,
            "Is {0} in {1}?",
            "Does {0} lie in {1}? Answer yes or no.",
            "Yes or no: {0} is a country in {1}.",
        ),
        _task(
            "countries", "more_people", rows.more_people,
            "True or false: {0} has more people than {1}.",
            "The population of {0} is larger than that of {1}. True or false?",
        ),
        _task(
            "countries", "country_currency", rows.currencies,
            "What is the currency of {0}?",
            "Which currency do people use in {0}?",
            "Name the money used in {0}.",
        ),
        _task(
            "countries", "country_code", rows.codes,
            "What is the two-letter ISO code of {0}?",
            "Give the ISO country code for {0}.",
        ),
        _task(
            "names", "country_french", rows.country_names("fr"),
            "What is {0} called in French?",
            "Translate the country name into French: {0}",
            "Give the French name of {0}.",
        ),
        _task(
            "names", "country_german", rows.country_names("de"),
            "What is {0} called in German?",
            "Translate the country name into German: {0}",
            "Give the German name of {0}.",
        ),
        _task(
            "names", "country_spanish", rows.country_names("es"),
            "What is {0} called in Spanish?",
            "Translate the country name into Spanish: {0}",
            "Give the Spanish name of {0}.",
        ),
        _task(
            "names", "language_endonym", rows.endonyms,
            "What is the {0} language called in {0}?",
            "How do speakers of {0} name their own language?",
        ),
        _task(
            "names", "month_translation", rows.months,
            "What is the month {0} called in {1}?",
            "Translate {0} into {1}.",
            "Give the {1} word for the month of {0}.",
        ),
        _task(
            "numbers", "number_english", rows.number_words("en", 500),
            "Write {0} in words.",
            "Spell out the number {0} in English.",
            "How do you say {0} in English words?",
            table="english_number",
        ),
        _task(
            "numbers", "english_number", rows.words_to_number,
            "Write {0} in digits.",
            "Which number is {0}?",
            "Turn these words into a number: {0}",
            table="english_number",
        ),
        _task(
            "numbers", "number_french", rows.number_words("fr", 200),
            "Write {0} in French words.",
            "How do you say {0} in French?",
            "Spell out the number {0} in French.",
        ),
        _task(
            "numbers", "number_german", rows.number_words("de", 200),
            "Write {0} in German words.",
            "How do you say {0} in German?",
            "Spell out the number {0} in German.",
        ),
        _task(
            "numbers", "number_spanish", rows.number_words("es", 200),
            "Write {0} in Spanish words.",
            "How do you say {0} in Spanish?",
            "Spell out the number {0} in Spanish.",
        ),
        _task(
            "numbers", "number_roman", rows.roman,
            "Write {0} as a Roman numeral.",
            "What is {0} in Roman numerals?",
        ),
        _task(
            "numbers", "number_ordinal", rows.ordinals,
            "Write the short ordinal form of {0}.",
            "What is {0} as an ordinal in digits?",
        ),
        _task(
            "arithmetic", "addition", rows.additions,
            "What is {0} plus {1}?",
            "Compute {0} + {1}.",
            "Add {0} and {1}.",
        ),
        _task(
            "arithmetic", "subtraction", rows.subtractions,
            "What is {0} minus {1}?",
            "Compute {0} - {1}.",
            "Subtract {1} from {0}.",
        ),
        _task(
            "arithmetic", "multiplication", rows.multiplications,
            "What is {0} times {1}?",
            "Compute {0} x {1}.",
            "Multiply {0} by {1}.",
        ),
        _task(
            "arithmetic", "larger_number", rows.larger_numbers,
            "Which is larger, {0} or {1}?",
            "Give the bigger of {0} and {1}.",
            "What is the maximum of {0} and {1}?",
        ),
        _task(
            "arithmetic", "even_odd", rows.even_odd,
            "Is {0} even or odd?",
            "Even or odd: {0}",
            "Tell whether {0} is an odd or an even number.",
        ),
        _task(
            "arithmetic", "prime", rows.primes,
            "Is {0} a prime number?",
            "Yes or no: {0} is prime.",
            "Does {0} count as a prime? Answer yes or no.",
        ),
        _task(
            "words", "plural", rows.plurals,
            "What is the plural of {0}?",
            "Give the plural form: {0}",
            "One {0}, two",
            table="plural",
        ),
        _task(
            "words", "singular", rows.singulars,
            "What is the singular of {0}?",
            "Give the singular form: {0}",
            "Two {0}, one",
            table="plural",
        ),
        _task(
            "words", "article", rows.articles,
            "Does {0} take a or an?",
            "A or an: ___ {0}",
            "Choose the article, a or an, for {0}.",
        ),
        _task(
            "letters", "reverse_word", rows.spelling(lambda word: word[::-1]),
            "Reverse the word {0}.",
            "Write {0} backwards.",
            "Spell {0} from the last letter to the first.",
        ),
        _task(
            "letters", "last_letter", rows.spelling(lambda word: word[-1]),
            "What is the last letter of {0}?",
            "Which letter does {0} end with?",
            "Give the final letter of the word {0}.",
        ),
        _task(
            "letters", "count_vowels", rows.spelling(rows.count_vowels),
            "How many of the letters a, e, i, o, u are in {0}?",
            "Count the letters a, e, i, o and u in {0}.",
        ),
        _task(
            "letters", "uppercase", rows.spelling(str.upper),
            "Write {0} in capital letters.",
            "Convert to uppercase: {0}",
            "Put the word {0} in upper case.",
        ),
        _task(
            "letters", "sort_words", rows.sorted_words,
            "Sort alphabetically: {0} {1} {2}",
            "Put these words in alphabetical order: {0}, {1}, {2}",
            "Arrange {0}, {1} and {2} from A to Z.",
        ),
        _task(
            "dates", "days_after", rows.days_after,
            "Which day is {0} days after {1}?",
            "Today is {1}. What day is it in {0} days?",
            "Name the weekday {0} days after a {1}.",
        ),
        _task(
            "elements", "element_symbol", rows.symbols,
            "What is the chemical symbol of {0}?",
            "Give the symbol for the element {0}.",
            "Complete: The symbol of {0} is",
            table="symbol",
        ),
        _task(
            "elements", "symbol_element", rows.symbol_elements,
            "Which element has the symbol {0}?",
            "Name the chemical element {0}.",
            "Complete: {0} is the symbol of",
            table="symbol",
        ),
        _task(
            "elements", "symbol_choice", rows.symbol_choices,
            "Which is the chemical symbol of {0}? " + _OPTIONS,
            "Choose the symbol of {0}. " + _OPTIONS,
            table="symbol",
        ),
        _task(
            "elements", "element_number", rows.atomic_numbers,
            "What is the atomic number of {0}?",
            "How many protons does an atom of {0} have?",
            "Give the place of {0} in the periodic table.",
        ),
        _task(
            "elements", "metal", rows.metals,
            "Is {0} a metal or a nonmetal?",
            "Metal or nonmetal: {0}",
            "Tell whether the element {0} is a metal or a nonmetal.",
        ),
        _task(
            "units", "unit_conversion", rows.conversions,
            "How many {2} are in {0} {1}?",
            "Convert {0} {1} to {2}.",
            "{0} {1} equal how many {2}?",
        ),
        _task(
            "units", "unit_quantity", rows.quantities,
            "What does the unit {0} measure?",
            "Which quantity is measured in the unit {0}?",
            "Name the physical quantity of the unit {0}.",
        ),
    )
}  # fmt: skip

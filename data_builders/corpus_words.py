"""Word lists of the demo corpus: common nouns, and the units it converts or classifies."""

NOUNS = """
acorn actor airport album alley angel animal ankle answer ant apple apron arch arm army arrow
artist atom aunt axe baby bag baker ball banana bank basket bean bear bed bee bell belt bench
berry bird blanket boat bone book bottle bowl box boy branch bridge brother brush bucket
bus butterfly button cabbage cake camel camera candle car carrot castle cat cave chair cheese
cherry chicken child church circle city class clock cloud coat coin computer cook country cow
crown cup daisy dancer day desk dish doctor dog donkey door dress drum duck eagle ear egg
elbow elephant engine envelope evening eye face family farm farmer fairy feather fence field
finger fire flag flower fly foot forest fork fox friend frog garden gate gift giraffe girl
glass goose grape guitar half hammer hand hat heart hen hero hill horse hospital hotel hour
house igloo idea insect iron island jacket jar judge kettle key king kitchen kite kitten knee
knife ladder lady lake lamp leaf lemon letter library life lion loaf lunch machine man map
market match mirror monkey moon mountain mouse mouth nail neck needle nest night nose notebook
ocean office olive onion orange orchard ostrich oven owl ox painter pan paper park party
peach pencil penny photo piano picture pig pillow pilot planet plate plum pocket pony potato
puppy queen question rabbit ring river road robot roof room rose sailor school shelf ship shirt
shoe shop sister snake sock song spider spoon star station stone story street student sun table
teacher ticket tiger tomato tooth tower toy train tree turtle umbrella uncle unicorn
uniform university valley village violin wall watch whale wheel wife window wing wish witch
wolf woman yard year zebra
"""

# (unit, smaller unit): the first is a whole number of the second.
UNIT_PAIRS: tuple[tuple[str, str], ...] = (
    ("kilometer", "meter"),
    ("meter", "centimeter"),
    ("centimeter", "millimeter"),
    ("yard", "foot"),
    ("foot", "inch"),
    ("mile", "yard"),
    ("kilogram", "gram"),
    ("gram", "milligram"),
    ("pound", "ounce"),
    ("liter", "milliliter"),
    ("gallon", "quart"),
    ("quart", "pint"),
    ("minute", "second"),
    ("hour", "minute"),
    ("day", "hour"),
    ("week", "day"),
    ("century", "year"),
    ("kilowatt", "watt"),
)

# quantity -> units that measure it
UNITS_BY_QUANTITY: dict[str, str] = {
    "length": (
        "meter kilometer centimeter millimeter micrometer nanometer angstrom inch foot yard mile"
        " nautical_mile light_year parsec fathom furlong rod"
    ),
    "mass": "gram kilogram milligram microgram tonne ounce pound stone carat grain slug",
    "time": (
        "second millisecond microsecond nanosecond minute hour day week fortnight month year"
        " century"
    ),
    "energy": "joule kilojoule calorie kilowatt_hour electron_volt erg",
    "power": "watt kilowatt megawatt milliwatt horsepower",
    "force": "newton kilonewton dyne kip poundal",
    "pressure": "pascal kilopascal bar millibar atmosphere torr",
    "volume": "liter milliliter gallon quart pint teaspoon tablespoon bushel cubic_centimeter",
    "area": "hectare acre square_mile square_foot",
    "speed": "knot meter_per_second mile_per_hour kilometer_per_hour",
    "frequency": "hertz kilohertz megahertz gigahertz",
    "voltage": "volt millivolt kilovolt",
    "current": "ampere milliampere microampere",
    "resistance": "ohm kiloohm megaohm",
    "temperature": "kelvin",
}

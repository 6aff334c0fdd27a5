"""Words of the lab: people, places, crafts, units and months, and the facts that hold among them.

Every name is one capitalised token of the lab's tokenizer, so each table here is also part of its vocabulary.
The facts are fixed arithmetic on positions: nothing is drawn, and no two interpreters can disagree.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "CRAFTS",
    "CRAFT_OF",
    "HOME_OF",
    "LANDS",
    "LAND_OF",
    "MONTHS",
    "PEOPLE",
    "RIVERS",
    "RIVER_OF",
    "TOOLS",
    "TOOL_OF",
    "TOWNS",
    "TRAITS",
    "UNIT_PAIRS",
]

PEOPLE: Final = (
    *("Kevar", "Dalin", "Mirek", "Tovan", "Selda", "Orla", "Bram", "Cato", "Edda", "Finn", "Galo", "Hesta"),
    *("Ivo", "Jorun", "Kasim", "Lenka", "Mabel", "Nesto", "Otis", "Petra", "Quill", "Runa", "Sorin", "Tilda"),
    *("Ulric", "Vesna", "Wanda", "Xeno", "Yara", "Zoltan", "Anders", "Berit", "Corin", "Dagny", "Emil", "Freya"),
    *("Gunnar", "Hilde", "Imre", "Jana", "Karel", "Liv", "Magnus", "Nadia", "Oskar", "Pavel", "Rasmus", "Signe"),
)
TOWNS: Final = (
    *("Belm", "Deko", "Farro", "Gildo", "Hask", "Jurn"),
    *("Lomar", "Nivel", "Pelm", "Rudan", "Tessel", "Wick"),
)
LANDS: Final = ("Vokin", "Astara", "Norrin", "Calder", "Umbra")
RIVERS: Final = ("Sarn", "Isel", "Mura", "Teva", "Onda", "Lirra", "Brenna", "Kolva")
CRAFTS: Final = ("Baker", "Smith", "Weaver", "Miller", "Carver", "Fisher", "Mason", "Tailor")
TOOLS: Final = ("Oven", "Hammer", "Loom", "Sieve", "Chisel", "Net", "Trowel", "Needle")
TRAITS: Final = ("tall", "kind", "calm", "rich", "brave", "quick", "wise", "proud")
MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

UNIT_PAIRS: Final[dict[str, tuple[tuple[str, str, int], ...]]] = {
    "length": (
        ("kilometres", "metres", 1000),
        ("metres", "centimetres", 100),
        ("centimetres", "millimetres", 10),
    ),
    "mass": (("tonnes", "kilograms", 1000), ("kilograms", "grams", 1000)),
    "volume": (("litres", "millilitres", 1000), ("hectolitres", "litres", 100)),
}
"""Kind of quantity -> (larger unit, smaller unit, how many smaller make one larger)."""

# The multipliers are coprime to the table sizes, so neighbours in a table share no attribute by accident.
HOME_OF: Final = {p: TOWNS[(7 * i + i // 12) % len(TOWNS)] for i, p in enumerate(PEOPLE)}
CRAFT_OF: Final = {p: CRAFTS[(5 * i + i // 8 + 3) % len(CRAFTS)] for i, p in enumerate(PEOPLE)}
LAND_OF: Final = {t: LANDS[(3 * i + i // 5) % len(LANDS)] for i, t in enumerate(TOWNS)}
RIVER_OF: Final = {t: RIVERS[(5 * i + i // 8 + 1) % len(RIVERS)] for i, t in enumerate(TOWNS)}
TOOL_OF: Final = dict(zip(CRAFTS, TOOLS, strict=True))

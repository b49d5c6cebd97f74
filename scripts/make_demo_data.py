"""Make the demo's rows, src/recall_merge/demo/data/TASK/{train,test}.jsonl, with the same bytes every time.

    pip install Babel==2.18.0
    python scripts/make_demo_data.py            # all tasks
    python scripts/make_demo_data.py opinion    # one task; those from demo_messages/ need no package

`opinion` and `desk` are messages written for this project (demo_messages/*.txt: a heading [split label], then one message per line).
`french` combines names and patterns of Unicode CLDR, in English and French, as Babel ships them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE.parent / "src" / "recall_merge" / "demo" / "data"
BABEL = "2.18.0"

Records = dict[str, list[dict[str, Any]]]  # by split


def opinion() -> Records:
    return messages("opinion", "Is this opinion positive or negative?\n{}")


def desk() -> Records:
    return messages("desk", "Which desk answers this: billing, delivery, returns, account or technical?\n{}")


def messages(task: str, question: str) -> Records:
    """Rows with choices. Labels alternate, so any number of first rows is balanced too."""
    groups: dict[tuple[str, str], list[str]] = {}
    for line in (HERE / "demo_messages" / f"{task}.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            split, label = line.strip("[]").split()
            current = groups.setdefault((split, label), [])
        elif line:
            current.append(line)
    labels = list(dict.fromkeys(label for _, label in groups))
    return {
        split: [
            {"prompt": question.format(message), "completion": label, "choices": labels}
            for messages_in_turn in zip(*(groups[split, label] for label in labels), strict=True)
            for label, message in zip(labels, messages_in_turn, strict=True)
        ]
        for split in ("train", "test")
    }


TERRITORIES = "AR AT BE BR CA CH CL CN CZ DE DK DZ EG ES FI FR GB GR HU IE IN IT JP KE MA MX NL NO PE PL PT RO RU SE TN TR UA US ZA"
LANGUAGES = "ar cs da de el en es fi fr hu it ja nl no pl pt ro ru sv tr uk zh"
CURRENCIES = "AUD BRL CAD CHF CNY CZK DKK EUR GBP INR JPY MXN NOK PLN SEK TRY USD ZAR"
UNITS = (
    "length-kilometer length-meter length-centimeter length-mile mass-kilogram mass-gram mass-tonne volume-liter "
    "duration-minute duration-hour duration-day duration-week duration-month duration-year"
)
PERIODS = {"minutes": 45, "hours": 20, "days": 6, "weeks": 3}  # the largest number that people still say in this unit
EACH = {"train": 42, "test": 14}  # rows of each kind


def french() -> Records:
    """Rows to translate. Single words of a test row may occur in training; their combination is new."""
    import babel
    from babel import Locale
    from babel.dates import format_date, format_timedelta
    from babel.lists import format_list
    from babel.numbers import get_currency_name
    from babel.units import format_unit

    if babel.__version__ != BABEL:
        raise SystemExit(f"Babel {babel.__version__} is installed; the rows are made with {BABEL}")
    draw = Draw("french")
    locales = Locale("en"), Locale("fr")

    def days() -> Iterator[str]:
        when = date(2020, 1, 1) + timedelta(days=draw.below(4000))
        return (format_date(when, "full", locale) for locale in locales)

    def times() -> Iterator[str]:
        unit = draw.choice(list(PERIODS))
        ahead = timedelta(**{unit: draw.choice([1, -1]) * (2 + draw.below(PERIODS[unit] - 1))})
        return (format_timedelta(ahead, add_direction=True, locale=locale) for locale in locales)

    def measures() -> Iterator[str]:
        number, unit = 2 + draw.below(98), draw.choice(UNITS.split())
        texts = [format_unit(number, unit, locale=locale) for locale in locales]
        assert not any(unit in text for text in texts), f"CLDR has no words for {unit}, so Babel gives its code"
        return iter(texts)

    def amounts() -> Iterator[str]:
        number, code = 2 + draw.below(98), draw.choice(CURRENCIES.split())
        return (f"{number} {get_currency_name(code, count=number, locale=locale)}" for locale in locales)

    def lists(kind: str, codes: str) -> Callable[[], Iterator[str]]:
        def names() -> Iterator[str]:
            chosen = sorted(draw.sample(codes.split(), 2 + draw.below(2)))  # sorted, so that no list is repeated in another order
            return (format_list([getattr(locale, kind)[code] for code in chosen], locale=locale) for locale in locales)

        return names

    kinds = [days, times, measures, amounts, lists("territories", TERRITORIES), lists("languages", LANGUAGES)]
    rows: Records = {}
    seen: set[str] = set()
    for split, count in EACH.items():
        rows[split] = []
        for _ in range(count):
            for kind in kinds:
                english, other = kind()
                while english in seen:
                    english, other = kind()
                seen.add(english)
                # CLDR has no-break spaces around French numbers; plain spaces serve as well here
                other = other.replace("\u202f", " ").replace("\u00a0", " ")
                rows[split].append({"prompt": f"Say in French: {english}", "completion": other})
    return rows


class Draw:
    """Draws from `random.random` alone: Python promises that its numbers stay the same in every version."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def below(self, end: int) -> int:
        return int(self._random.random() * end)

    def choice(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Any], count: int) -> list[Any]:
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


TASKS: dict[str, Callable[[], Records]] = {"opinion": opinion, "desk": desk, "french": french}


def json_lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(names: Sequence[str]) -> None:
    for name in names or TASKS:
        for split, records in TASKS[name]().items():
            file = TARGET / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json_lines(records), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""How much of what identifies someone the scrubbing takes out, and how much it takes out that identifies nobody.

    python benchmarks/scrub_recall.py > benchmarks/results/scrub_recall.md

Recall is on notes that are made here: sentences as clinical notes have them, with identifiers drawn by chance. Names
are common ones or of no list (drawn from syllables), with or without something beside them that says that they are
names. What is wrongly taken out is counted on the project's own texts, which describe nobody. Made notes are easier
than real ones: these figures are an upper end, and no measure of de-identification.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medcompile.serve.scrub import Scrubber  # noqa: E402

NOTES = 400
COMMON = [
    "Mary Johnson",
    "Robert Garcia",
    "Patricia Lee",
    "Ahmed Hassan",
    "Maria Rossi",
    "Wei Chen",
    "John O'Neill",
    "Priya Patel",
]
SYLLABLES = [
    "zor",
    "van",
    "kel",
    "tic",
    "bra",
    "mi",
    "jo",
    "lun",
    "dre",
    "pa",
    "shi",
    "vo",
    "ran",
    "tel",
    "gur",
    "ima",
    "noe",
    "fi",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
PLACES = [
    "12 Oak Street",
    "7704 North Maple Avenue, Apt 3B",
    "31 Castle Road",
    "Springfield, IL 62704",
    "Leeds LS1 4AP",
]


def drawn_name(chance: random.Random) -> str:
    def word() -> str:
        return "".join(chance.choices(SYLLABLES, k=chance.choice((2, 3)))).capitalize()

    return f"{word()} {word()}"


def drawn_date(chance: random.Random) -> str:
    day, month, year = chance.randint(1, 28), chance.randint(1, 12), chance.randint(1930, 2026)
    forms = (
        f"{month}/{day}/{year}",
        f"{day:02d}.{month:02d}.{year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{MONTHS[month - 1]} {day}, {year}",
        f"{day} {MONTHS[month - 1][:3]} {year}",
        f"{MONTHS[month - 1]} {year}",
    )
    return chance.choice(forms)


def digits(chance: random.Random, count: int) -> str:
    return "".join(chance.choices("0123456789", k=count))


def drawn_phone(chance: random.Random) -> str:
    area, middle, last = chance.randint(201, 989), chance.randint(200, 999), digits(chance, 4)
    return chance.choice((f"({area}) {middle}-{last}", f"{area}-{middle}-{last}", f"+1 {area} {middle} {last}"))


def drawn_ssn(chance: random.Random) -> str:
    return f"{chance.randint(101, 665)}-{chance.randint(11, 99)}-{chance.randint(1000, 9999)}"


Draw = Callable[[random.Random], str]
KINDS: Mapping[str, tuple[Draw, tuple[str, ...]]] = {
    "a common name, with a sign (title, label, age)": (
        lambda chance: chance.choice(COMMON),
        ("Seen with Dr. {} today.", "Patient: {}", "{}, 54, has chest pain.", "Signed by: {}, MD", "Dear Mrs {},"),
    ),
    "a name of no list, with a sign": (
        drawn_name,
        ("Seen with Dr. {} today.", "Patient: {}", "{}, 54, has chest pain.", "Signed by: {}, MD", "Dear Mrs {},"),
    ),
    "a common name, without a sign": (
        lambda chance: chance.choice(COMMON),
        ("Discussed with {} at length.", "{} improved overnight.", "The results were given to {}."),
    ),
    "a name of no list, without a sign": (
        drawn_name,
        ("Discussed with {} at length.", "{} improved overnight.", "The results were given to {}."),
    ),
    "a date": (drawn_date, ("Admitted on {}.", "DOB: {}", "Follow-up {} in clinic.", "Last seen {} for asthma.")),
    "a telephone number": (drawn_phone, ("Call {} with questions.", "Phone: {}", "Daughter reachable at {}.")),
    "an e-mail address": (
        lambda chance: f"{drawn_name(chance).replace(' ', '.').lower()}@{chance.choice(('mail.example.org', 'x.co'))}",
        ("Write to {} about it.", "E-mail: {}"),
    ),
    "a record or account number, with a label": (
        lambda chance: chance.choice(
            (digits(chance, 8), f"A{digits(chance, 7)}", f"{digits(chance, 3)}-{digits(chance, 5)}")
        ),
        ("MRN {}.", "MRN: {}", "Medical record number {}", "Account #: {}", "Accession number: {}"),
    ),
    "a social security number": (drawn_ssn, ("SSN {}.", "Social security: {}", "on file as {}")),
    "an address": (lambda chance: chance.choice(PLACES), ("Lives at {}.", "Address: {}", "Moved to {} last year.")),
    "an age from 90": (lambda chance: str(chance.randint(90, 105)), ("A {}-year-old woman.", "{} y/o man.", "Age: {}")),
    "a web address": (lambda chance: f"https://portal.example.org/p/{digits(chance, 5)}", ("See {} for it.",)),
}
AROUND = (
    "BP 132/84, HR 76.",
    "Creatinine 1.4 mg/dL, potassium 4.2.",
    "Continue metformin 500 mg b.i.d.",
    "No acute distress.",
)


def notes(kind: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    """(note, what must not be in it afterwards)."""
    draw, sentences = KINDS[kind]
    for number in range(NOTES):
        held = draw(chance)
        before, after = chance.sample(AROUND, 2)
        yield f"{before} {sentences[number % len(sentences)].format(held)} {after}", held


def main() -> None:
    scrubber, chance = Scrubber(), random.Random(0)
    listed = Scrubber(names=COMMON)
    print(f"# Scrubbing\n\nPrinted by `benchmarks/scrub_recall.py`; {NOTES} made notes of each kind.\n")
    print("| what identifies | taken out whole | with those names in `--scrub-names` |\n|---|---|---|")
    for kind in KINDS:
        made = list(notes(kind, chance))
        found = sum(not _left(scrubber, note, held) for note, held in made)
        cell = ""
        if "common name" in kind:
            cell = f"{sum(not _left(listed, note, held) for note, held in made) / NOTES:.1%}"
        print(f"| {kind} | {found / NOTES:.1%} | {cell} |", flush=True)
    print(
        "\n| texts that describe nobody | texts | characters taken out | texts touched | ms each |"
        "\n|---|---|---|---|---|"
    )
    for name in ("clinical-notes", "biomedical-sentences"):
        lines = (ROOT / "calibration" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        began_s = time.perf_counter()
        told = [scrubber.scrub(text) for text in texts]
        ms = 1000 * (time.perf_counter() - began_s) / len(texts)
        taken = sum(one.end - one.start for scrubbed in told for one in scrubbed.replaced)
        touched = [(text, scrubbed) for text, scrubbed in zip(texts, told, strict=True) if scrubbed.replaced]
        share = taken / sum(map(len, texts))
        print(f"| {name} | {len(texts)} | {share:.2%} | {len(touched)} | {ms:.2f} |", flush=True)
        for text, scrubbed in touched[:40]:
            pieces = [f"{text[one.start : one.end]!r} as {one.kind}" for one in scrubbed.replaced]
            print("; ".join(pieces), file=sys.stderr)


def _left(scrubber: Scrubber, note: str, held: str) -> bool:
    """Whether any word of it can still be read."""
    told = scrubber.scrub(note).text
    words = [re.escape(word) for word in held.replace(",", " ").split() if len(word) > 1]
    return re.search(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", told) is not None


if __name__ == "__main__":
    main()

"""Generate the sentence-pair corpus of the package: `python -m training.corpus.generate`.

The pairs have the columns of MRPC (sentence1, sentence2, label, idx) and its share of positives (about 68 %). Each
sentence states five facts (who, what was done, to what, where, when). A positive pair states the same facts in another
word order and, often, with a synonym of the verb; in a negative pair three to five facts differ. Facts of both kinds of
pair are drawn from the same distributions, so a single sentence contains no information about the label. All words are
from this file; there is no source text and so no licence.

The output is reproducible: the only source of randomness is `random.Random(seed).random()`, whose sequence is the same in
all versions of Python.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

TRAIN_PAIRS = 6000
VALIDATION_PAIRS = 408  # as many as MRPC has
POSITIVE = 0.68
SEED = 20240229

WHO = ["anna", "boris", "carla", "david", "elena", "frank", "greta", "hugo", "irene", "jonas", "karin", "louis"]
VERBS = (
    ("bought", "purchased", "acquired"),
    ("sold", "auctioned", "traded"),
    ("repaired", "fixed", "restored"),
    ("painted", "coloured", "decorated"),
    ("lost", "misplaced", "mislaid"),
    ("found", "discovered", "located"),
    ("hid", "concealed", "buried"),
    ("borrowed", "rented", "leased"),
)
WHAT = ["boat", "house", "piano", "clock", "horse", "lamp", "mirror", "novel", "radio", "statue", "ticket", "violin"]
WHERE = [
    "athens",
    "berlin",
    "cairo",
    "dublin",
    "geneva",
    "havana",
    "kyoto",
    "lisbon",
    "madrid",
    "nairobi",
    "oslo",
    "paris",
]
WHEN = [
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
    "january",
    "march",
    "april",
    "june",
    "august",
]
FORMS = (
    "{who} {verb} the {what} in {where} on {when} .",
    "on {when} , {who} {verb} the {what} in {where} .",
    "the {what} was {verb} by {who} in {where} on {when} .",
    "in {where} , the {what} was {verb} on {when} by {who} .",
    "on {when} in {where} the {what} was {verb} by {who} .",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Facts = tuple[str, int, str, str, str]  # who, which row of VERBS, what, where, when


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _facts(rng: random.Random) -> Facts:
    return _pick(rng, WHO), _pick(rng, range(len(VERBS))), _pick(rng, WHAT), _pick(rng, WHERE), _pick(rng, WHEN)


def _say(rng: random.Random, facts: Facts) -> str:
    who, verb, what, where, when = facts
    return _pick(rng, FORMS).format(who=who, verb=_pick(rng, VERBS[verb]), what=what, where=where, when=when)


def _changed(rng: random.Random, facts: Facts) -> Facts:
    """Replace three to five of `facts`."""
    choices: tuple[Sequence[object], ...] = (WHO, range(len(VERBS)), WHAT, WHERE, WHEN)
    changed: list[object] = list(facts)
    slots = sorted(range(5), key=lambda _: rng.random())[: 3 + int(rng.random() * 3)]
    for slot in slots:
        changed[slot] = _pick(rng, [choice for choice in choices[slot] if choice != facts[slot]])
    return tuple(changed)  # type: ignore[return-value]


def pairs(count: int, seed: int) -> list[tuple[str, str, int, int]]:
    """`count` rows of (sentence1, sentence2, label, idx); label 1: same facts."""
    rng = random.Random(seed)
    rows = []
    for idx in range(count):
        facts = _facts(rng)
        same = rng.random() < POSITIVE
        rows.append((_say(rng, facts), _say(rng, facts if same else _changed(rng, facts)), int(same), idx))
    return rows


def vocabulary() -> list[str]:
    """A WordPiece vocabulary: the words of the corpus, then letters and digits for other text."""
    words = {word for form in FORMS for word in form.split() if not word.startswith("{")}
    words |= {*WHO, *WHAT, *WHERE, *WHEN, *(word for row in VERBS for word in row)}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*SPECIAL, *sorted(words), *letters, *(f"##{letter}" for letter in letters), *"!?'\"-;:()$%"]
    return list(dict.fromkeys(pieces))


def render() -> dict[str, str]:
    """File name -> text of the files that this script writes."""
    files = {"vocab.txt": "".join(f"{piece}\n" for piece in vocabulary())}
    for name, count, seed in (("train", TRAIN_PAIRS, SEED), ("validation", VALIDATION_PAIRS, SEED + 1)):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("sentence1", "sentence2", "label", "idx"))
        writer.writerows(pairs(count, seed))
        files[f"{name}.csv"] = text.getvalue()
    return files


if __name__ == "__main__":
    for name, text in render().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")

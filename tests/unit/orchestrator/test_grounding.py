"""Which sentence a marker stands for, and whether its passage bears it out."""

import pytest

from services.orchestrator.citations import SENTENCE_CHARACTERS_MAX, CitationReader
from services.orchestrator.domain import Passage
from services.orchestrator.grounding import GROUNDEDNESS_MIN, SUPPORT_MIN, Evidence, support
from services.orchestrator.reading import content_words, numbers

GATE = "The gateway listens on port 8080 by default. It must not be restarted while answers run. Retries increase the load on the provider."
LEDGER = "Holds live for ten minutes and are then swept. Prices are integers in nano-USD per million tokens."
WEHR = "Das Wehr ist vier Meter hoch und wird nicht mehr gewartet."


def passage(number: int, text: str, title: str = "") -> Passage:
    return Passage(number, f"d{number}", f"c{number}", title, "", text, 0, len(text), 1.0)


def judged(claim: str, *texts: str, title: str = "") -> float | None:
    return support(claim, Evidence(passage(number, text, title) for number, text in enumerate(texts, 1)))


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ("The gateway listens on port 8080.", GATE),
        ("By default the **gateway** is listening on port `8080`", GATE),
        ("- A hold lives 10 minutes", LEDGER),
        ("Prices: integers, in nano-USD.", LEDGER),
        ("Answers that run forbid a restart: it must not be restarted.", GATE),
        ("Das Wehr ist 4 Meter hoch.", WEHR),
        ("水門は朝に開く", "水門は朝に開く。夜には閉じる。"),
    ],
)
def test_what_the_passage_says_is_borne_out(claim: str, text: str) -> None:
    """Also in other words, other order and with numbers written out."""
    assert (judged(claim, text) or 0) >= SUPPORT_MIN


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ("The gateway listens on port 8080.", LEDGER),
        ("The gateway listens on port 9090 by default.", GATE),
        ("The gateway listens on port 80 by default.", GATE),
        ("Holds live for twenty minutes and are then swept.", LEDGER),
        ("The gateway must be restarted while answers run.", GATE),
        ("The gateway does not listen on port 8080 by default.", GATE),
        ("Retries decrease the load on the provider.", GATE),
        ("Das Wehr wird täglich gewartet und ist vier Meter hoch.", "Der Müller mahlt jeden Tag Korn und verkauft das Mehl."),
    ],
)
def test_what_the_passage_does_not_say_is_not(claim: str, text: str) -> None:
    """Other matter, other figures, a negation more or less, the opposite."""
    assert (judged(claim, text) or 0) < SUPPORT_MIN


@pytest.mark.parametrize(
    ("claim", "text"), [("It is so.", GATE), ("…", GATE), ("Das Tor ist nicht auf dem Port 8080 und wird gewartet.", GATE)]
)
def test_what_cannot_be_judged_is_not(claim: str, text: str) -> None:
    """No words that say anything, or another language than the passage's."""
    assert judged(claim, text) is None


def test_headings_are_evidence_too() -> None:
    """A passage says what it says of what its document is about."""
    assert (judged("The turbine hall houses a generator.", "It houses a generator.", title="The turbine hall") or 0) == 1


def test_numbers_are_compared_by_value() -> None:
    """However they are written; a name's number is none."""
    assert numbers("1,000 or 1000.0, two of 2, 0.50 and 3 kg") == {"1000", "2", "0.5", "3"}
    assert numbers("IL-2, utf8, NIH 3T3 and BRCA 1") == set()


def test_scripts_without_spaces_are_compared_by_pairs() -> None:
    """Their sentences are one word to others."""
    assert content_words("水門が") == ["水門", "門が"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is old. The gate opens [1].", ["The gate opens"]),
        ("The gate opens. [1] Then it shuts. [2]", ["The gate opens.", "Then it shuts."]),
        ("The gate opens [1] and it shuts [2].", ["The gate opens", "and it shuts"]),
        ("The gate opens [1][2].", ["The gate opens", "The gate opens"]),
        ("The gate opens [1], [2].", ["The gate opens", "The gate opens"]),
        ("The gate opens. [1]\n\n- It shuts [2]\n- It is old [1]", ["The gate opens.", "It shuts", "It is old"]),
        ("Tools, e.g. The Gate, open [1]", ["Tools, e.g. The Gate, open"]),
        ("Es gilt z.B. Stufe 3 [1]", ["Es gilt z.B. Stufe 3"]),
        ("# Title\n\nThe gate opens [1]", ["The gate opens"]),
        ("[1] The gate opens [2]", ["", "The gate opens"]),
    ],
)
def test_marker_belongs_to_the_sentence_it_ends(text: str, sentences: list[str]) -> None:
    """Its offsets cut it out of the text, without the marker."""
    found = CitationReader([passage(1, GATE), passage(2, LEDGER)]).read(text)

    assert [text[c.sentence_start : c.sentence_end] for c in found] == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Take `argv[1]` or ``a`[1]`` first [2].", ["Take `argv[1]` or ``a`[1]`` first"]),
        ("So:\n\n```python\nx = argv[1]\n```\n[2]", ["```python\nx = argv[1]\n```"]),
        ("So:\n\n~~~\n```\n# [1]. New\n~~~\n[2] It is so [1]", ["~~~\n```\n# [1]. New\n~~~", "It is so"]),
        ("- Do this:\n  ```\n  a[1]\n  ```\n  It is old [2]", ["It is old"]),
        ("```x[1]``` and y [2]", ["```x[1]``` and y"]),
        ("A ` stands alone.\nThe gate opens [1]", ["The gate opens"]),
        ("```\nx[1]\n````\nThe gate opens [1]", ["The gate opens"]),
        ("````\n```\nx[1]", []),
    ],
)
def test_a_marker_in_code_is_code(text: str, sentences: list[str]) -> None:
    """Which a reader sees as code, too; neither a citation nor an unknown number. A block of code is cited as a whole."""
    for parts in ([text], list(text)):
        reader = CitationReader([passage(1, GATE), passage(2, LEDGER)])
        found = [citation for part in parts for citation in reader.read(part)]

        assert [text[c.sentence_start : c.sentence_end] for c in found] == sentences
        assert not reader.unknown


def test_code_is_known_far_behind_its_beginning() -> None:
    """Also where more than any sentence stands between, or a run of marks comes in pieces."""
    for text in ("```\n" + "x\n" * SENTENCE_CHARACTERS_MAX * 3 + "y[1] [7]", "``" + "x " * SENTENCE_CHARACTERS_MAX * 3 + "` [7]"):
        reader = CitationReader([passage(1, GATE)])

        assert [citation for place in range(0, len(text), 7) for citation in reader.read(text[place : place + 7])] == []
        assert not reader.unknown


def test_sentence_far_before_its_marker_is_cut() -> None:
    """No answer is kept whole for a marker that may come."""
    (citation,) = CitationReader([passage(1, GATE)]).read("x " * SENTENCE_CHARACTERS_MAX + "end [1]")

    assert 0 < citation.sentence_end - citation.sentence_start <= SENTENCE_CHARACTERS_MAX


def test_sentence_of_two_passages_is_borne_out_by_both_together() -> None:
    """Each bears out a part; the share counts sentences, not markers."""
    reader = CitationReader([passage(1, "Alpha beta gamma delta."), passage(2, "Epsilon zeta theta kappa.")])
    reader.read("Alpha beta lambda omega psi chi phi rho sigma tau epsilon zeta [1, 2]. Elephants migrate far away [1].")

    assert (reader.judged, reader.groundedness) == (2, 0.5)


def test_share_is_known_at_any_moment() -> None:
    """None before the first citation that can be judged."""
    reader = CitationReader([passage(1, GATE)])
    shares = []
    for piece in ("The gateway listens on port 8080", " [1]. ", "It is so [1]. ", "Elephants migrate southwards [1]."):
        reader.read(piece)
        shares.append(reader.groundedness)

    assert shares == [None, 1.0, 1.0, 0.5]
    assert GROUNDEDNESS_MIN <= 0.5


def test_marker_with_as_many_numbers_as_passages_is_found_however_it_comes() -> None:
    """A long marker that is cut is still a marker."""
    many = [passage(number, GATE) for number in range(1, 33)]
    reader = CitationReader(many)
    marker = f"[{', '.join(str(number) for number in range(1, 33))}]"

    assert len([citation for letter in f"The gateway listens {marker}" for citation in reader.read(letter)]) == 32

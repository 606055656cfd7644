"""What can be quoted of a passage besides sentences: rows under the names of their columns, and code in its block."""

import time

import pytest

from services.orchestrator.citations import CitationReader
from services.orchestrator.domain import Passage
from services.orchestrator.extractive_model import choose, written
from services.orchestrator.quotes import CODE_LINES_MAX, quotable

PORTS = """The services listen here.

| service | port | what it owns |
|---------|-----:|--------------|
| `gateway` | 8080 | the edge \\| limits |
| ledger | 50053 | people and **money** |
| retrieval | 50052 | |

Each can be moved.
"""
CUPS = "Stanley Cups\n\nTeam | Location | Stanley Cups\nBlues | STL | 1\nFlyers | PHI | 2\nMaple Leafs | TOR | 13"
CLIENT = """A time limit can be set for each client, which all of its calls keep to:

```python
import mill

client = mill.Client(timeout=10.0)
first = client.sacks[1]
```

Without one they wait.
"""


def said(text: str) -> list[str]:
    return [quote.text for quote in quotable(text)]


def answer(question: str, *texts: str) -> str:
    found = [Passage(n + 1, f"d{n}", f"c{n}", "Guide", "g.md", text, 0, len(text), 1 / (n + 1)) for n, text in enumerate(texts)]
    return "".join(written(choose(question, found), found))


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (
            PORTS,
            [
                "The services listen here.",
                "service: `gateway`; port: 8080; what it owns: the edge | limits",
                "service: ledger; port: 50053; what it owns: people and money",
                "service: retrieval; port: 50052",
                "Each can be moved.",
            ],
        ),
        (
            CUPS,
            [
                "Team: Blues; Location: STL; Stanley Cups: 1",
                "Team: Flyers; Location: PHI; Stanley Cups: 2",
                "Team: Maple Leafs; Location: TOR; Stanley Cups: 13",
            ],
        ),
        ("a | b\n--|--\nc | d", ["a: c; b: d"]),
        ("\n | Monday | Tuesday\nnoon | open | shut\n | | ", ["noon; Monday: open; Tuesday: shut"]),
        ("Flyers | PHI | 2\nBlues | STL | 1", ["Flyers | PHI | 2", "Blues | STL | 1"]),
        ("| ledger | 50053 |\n| retrieval | 50052 |", ["ledger | 50053", "retrieval | 50052"]),
        ("+------+------+\n| name | port |\n+======+======+\n| mill | 8080 |\n+------+------+", ["name: mill; port: 8080"]),
        ("| only | names |\n|---|---|", []),
        ("| 1 | 2 |\n|---|---|\n| 3 | 4 |", []),
        ("The rule a | b holds for every mill.", ["The rule a | b holds for every mill."]),
    ],
)
def test_a_row_is_said_under_the_names_of_its_columns(table: str, rows: list[str]) -> None:
    """As Markdown has tables, and as ingestion writes those of other formats; a part of one that has lost its header has none."""
    assert said(table) == rows


def test_of_a_long_cell_the_sentences_are_said_behind_the_row_s_name() -> None:
    """A row that is a page of text is too much."""
    long = "The first sentence says this. " * 20
    table = f"| name | meaning |\n|---|---|\n| stall | {long} The mill then stops at once. |"

    assert said(table)[-1] == "stall: The mill then stops at once."


def test_a_line_of_code_is_said_with_its_block() -> None:
    """Every line of it leads to the whole, with the words before it beside."""
    lead, *lines, last = quotable(CLIENT)

    assert (lead.own, last.own) == ("A time limit can be set for each client, which all of its calls keep to.", "Without one they wait.")
    assert [line.own for line in lines] == ["import mill", "client = mill.Client(timeout=10.0)", "first = client.sacks[1]"]
    assert {line.text for line in lines} == {"```python\nimport mill\n\nclient = mill.Client(timeout=10.0)\nfirst = client.sacks[1]\n```"}
    assert {(line.beside, line.is_code) for line in lines} == {(lead.own, True)}


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (
            "Run it so:\n\n    $ mill run --port 80\n    $ mill stop\n\nThen all is well here.",
            ["```\n$ mill run --port 80\n$ mill stop\n```"],
        ),
        ("import mill\nmill.run(port=80)", ["```\nimport mill\nmill.run(port=80)\n```"]),
        ("run(port=80)\nstop()\n```\n\nThen all is well here.", ["```\nrun(port=80)\nstop()\n```"]),
        ("```\n![the mill](mill.gif)\n\nThen all is well here.", []),
        ("```\nmill.run(port=80)\nmill.stop()", ["```\nmill.run(port=80)\nmill.stop()\n```"]),
        ("~~~\n```\nrun\n```\n~~~", ["````\n```\nrun\n```\n````"]),
        ("```sh\nmill run", ["```sh\nmill run\n```"]),
        ("The mill (of the river)\nis old and grinds corn\nfor all of us.", []),
        ("- one item (of two)\n- another item (of two)", []),
        ("The call `run(port)` begins\nand `stop(port)` ends it;\nboth return `None`", []),
    ],
)
def test_code_is_known_by_its_fence_or_by_its_look(text: str, blocks: list[str]) -> None:
    """Ingestion leaves no fence around the code of a web page, and cuts long blocks."""
    assert list(dict.fromkeys(quote.text for quote in quotable(text) if quote.is_code)) == blocks


def test_of_long_code_the_lines_around_are_said() -> None:
    """No answer is a whole file."""
    code = "\n".join(f"step_{n}()" for n in range(100))
    (quote,) = [quote for quote in quotable(f"```\n{code}\n```") if quote.own == "step_50()"]

    assert "step_50()" in quote.text
    assert len(quote.text.splitlines()) == CODE_LINES_MAX + 2


@pytest.mark.parametrize(
    ("question", "start"),
    [
        ("Which port does the ledger listen on?", "service: ledger; port: 50053; what it owns: people and money. [1]"),
        ("How many Stanley Cups do the Flyers have?", "Team: Flyers; Location: PHI; Stanley Cups: 2. [2]"),
        ("Where are the Maple Leafs?", "Team: Maple Leafs; Location: TOR; Stanley Cups: 13. [2]"),
    ],
)
def test_an_answer_that_stands_in_a_row_is_the_row(question: str, start: str) -> None:
    """That row alone: the others share its header, and say something else."""
    assert answer(question, PORTS, CUPS) == start


def test_an_answer_that_stands_in_code_is_the_block() -> None:
    """Marked as code, behind what leads to it, and cited with the offsets of the whole block; what is in it cites nothing."""
    text = answer("How do I import the client of the mill?", CLIENT)
    reader = CitationReader([Passage(1, "d", "c", "Guide", "g.md", CLIENT, 0, len(CLIENT), 1.0)])
    citations = reader.read(text)

    assert "```python\nimport mill" in text
    assert [text[c.start : c.end] for c in citations] == ["[1]"] * len(citations)
    assert "first = client.sacks[1]\n```" in [text[c.sentence_start : c.sentence_end] for c in citations][-1]
    assert all(c.support is not None and c.support > 0.9 for c in citations)
    assert not reader.unknown


def test_a_sentence_that_says_the_same_goes_before_code() -> None:
    """Code is harder to read."""
    text = "The mill listens on port 80.\n\n```python\nmill.listen(80)  # port\n```\n"

    assert answer("Which port does the mill listen on?", text) == "The mill listens on port 80. [1]"


def test_one_block_of_code_is_enough() -> None:
    """The best one; whoever asks reads an answer, not a manual."""
    steps = ("--sacks 3 --water high", "--wheel slow --stone old", "--night --guard dog")
    text = answer("How do I run the mill?", "\n\n".join(f"Read on, it says.\n\n```sh\nmill run {step}\n```" for step in steps))

    assert text.count("```sh") == 1


def test_code_that_nobody_asked_for_is_said_if_nothing_says_it_better() -> None:
    """An example has a value, which is not the answer to what the default is."""
    text = "```python\nmill.run(sacks_min=1000)\n```\n\n`sacks_min` - Fewer are not ground. The default of it is 500."

    assert "1000" not in answer("What is the default of sacks_min?", text)
    assert "1000" in answer("What is the code to run with sacks_min?", text)
    assert "1000" in answer("What is sacks_min?", text.partition("\n\n")[0])


BLANK = " " * 30_000


@pytest.mark.parametrize(
    "text",
    [
        f"```{BLANK}`\nx",
        f"{BLANK}x | y\na | b",
        f"-|-{BLANK}x | y\na | b",
        f"|-|-{BLANK}x\n| a | b |",
        f"+---{BLANK}x\n| a | b |",
        " | " * 15_000,
        "; " * 15_000 + "\nx",
        "1" * 30_000 + " | 2\na | b",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """White space counts little when a document is cut, so that a passage may have much of it."""
    began = time.process_time()
    quotable(text)

    assert time.process_time() - began < 2.0, "quadratic, this takes ten seconds"

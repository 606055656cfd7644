"""Which passages go into a prompt."""

import pytest

from services.orchestrator.domain import Passage
from services.orchestrator.packing import PASSAGE_OVERHEAD_BYTES, pack

LONG = "The gateway keeps every stream open until the last token has left, and then it writes the receipt and closes the connection."


def passages(*texts: str) -> list[Passage]:
    return [Passage(n, f"d{n}", f"c{n}", "", "u", text, 0, len(text), 1.0 / n) for n, text in enumerate(texts, 1)]


def test_what_is_said_twice_is_shown_once_and_numbers_have_no_gap() -> None:
    """The better one stays; a copy with a heading, or cut at another place, is a copy."""
    packed = pack(passages(LONG, f"# Streams\n{LONG}", "Something else altogether, about prices and how they are kept.", LONG[20:]), 10_000)

    assert [passage.document_id for passage in packed] == ["d1", "d3"]
    assert [passage.number for passage in packed] == [1, 2]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (f"{LONG} It waits 10 s for that.", f"{LONG} It waits 60 s for that."),
        (f"{LONG} It may be resumed.", f"{LONG} It may not be resumed."),
        (
            "The free plan allows 10 requests a minute for each user of the tenant.",
            "The free plan allows 60 requests a minute for each user of the tenant.",
        ),
        (
            "Cached answers of a user are shared with all other users of the tenant.",
            "Cached answers of a user are not shared with all other users of the tenant.",
        ),
        ("Version 3.1 keeps the log for ten minutes after the answer.", "Version 3.2 keeps the log for ten minutes after the answer."),
    ],
)
def test_texts_that_differ_in_a_number_or_a_negation_are_both_shown(left: str, right: str) -> None:
    """However alike the rest is: one of them may be what was asked for."""
    assert len(pack(passages(left, right), 10_000)) == 2


def test_scripts_without_spaces_are_compared_too() -> None:
    """By runs of characters."""
    text = "ゲートウェイは最後のトークンが送信されるまですべてのストリームを開いたままにします"

    assert len(pack(passages(text, text, "台帳はすべての保留を十分間保持し価格は整数で保存されます"), 10_000)) == 2


def test_what_is_too_large_leaves_its_room_to_what_comes_after_it() -> None:
    """By score, within the budget; the best one is there whatever its size."""
    best, large, small = "best words here", "x" * 500, "small words here"
    budget = 2 * PASSAGE_OVERHEAD_BYTES + len(best) + len(small)

    assert [passage.text for passage in pack(passages(best, large, small), budget)] == [best, small]
    assert [passage.text for passage in pack(passages(large, small), 10)] == [large]
    assert pack([], 10) == ()

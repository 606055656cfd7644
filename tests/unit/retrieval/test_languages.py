"""Which language a text is in, and how its words are found whatever that is."""

import pytest

from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.languages import Languages, segmented

LANGUAGES = Languages()
ENCODER = EdgeBm25("english")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("What is the population of the city of Berlin?", "en"),
        ("Wie viele Menschen leben in der Stadt Berlin?", "de"),
        ("¿Cuántas personas viven en la ciudad de Berlín?", "es"),
        ("Сколько людей живёт в этом городе?", "ru"),
        ("เมืองนี้มีประชากรเท่าไร", "th"),
        ("", ""),
        ("error 404", ""),
        ("404 - 17.5", ""),
    ],
)
def test_the_language_of_a_sentence(text: str, code: str) -> None:
    """Sentences are told apart; what has no letters has no language."""
    assert code == LANGUAGES.detected(text)


@pytest.mark.parametrize(
    ("document", "language", "query"),
    [
        ("Die Häuser wurden in den Städten gebaut.", "de", "Wo wird ein Haus gebaut?"),
        ("The engines were running all night long.", "en", "Does the engine run?"),
        ("Errors are shown in red.", "en", "error 404"),
        ("这座城市的人口是三百万。", "zh", "城市的人口是多少?"),
        ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "th", "เมืองหลวงของไทย"),
    ],
)
def test_a_question_shares_words_with_its_document(document: str, language: str, query: str) -> None:
    """Endings are taken off in the document's own language; scripts without spaces are found by pairs of letters."""
    assert set(ENCODER.query(query).indices) & set(ENCODER.document(document, language).indices)


def test_scripts_with_spaces_are_left_as_they_are() -> None:
    """Only runs of an unspaced script are cut; a single letter stays one."""
    assert "plain words, 42" == segmented("plain words, 42")
    assert "v2 人口 口是 ok" == " ".join(segmented("v2人口是ok").split())
    assert "水" == segmented("水").strip()

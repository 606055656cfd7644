"""What the retrieval benchmark computes, without a service."""

import zipfile
from io import BytesIO
from itertools import pairwise

import pytest

from bench.hostile_files import ENTRIES, bombs
from bench.retrieval import FIXED_OVERLAP, FIXED_TOKENS, _fixed, middle_sentence
from bench.retrieval_figures import backwards, common, covered, length, mean, ndcg, percentile, recall


def test_a_ranking_is_worth_more_the_earlier_the_right_documents_come() -> None:
    assert ndcg(["a", "b"], {"a": 1}) == 1
    assert ndcg(["b", "a"], {"a": 1}) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg(["b"] * 10 + ["a"], {"a": 1}) == 0
    assert ndcg(["a"], {"a": 1, "b": 1}) == pytest.approx(0.6131, abs=1e-4)
    assert ndcg(["a"], {}) == 0


def test_recall_is_of_the_relevant_documents_alone() -> None:
    assert recall(["a", "x"], {"a": 1, "b": 1, "x": 0}) == 0.5
    assert recall(["x", "a"], {"a": 1}, depth=1) == 0
    assert recall(["a"], {"a": 0}) == 0


def test_a_character_in_two_spans_counts_once() -> None:
    assert covered([(5, 9), (0, 3), (2, 4), (4, 5)]) == [(0, 9)]
    assert length([(0, 10), (5, 15), (20, 21)]) == 16
    assert common([(0, 10), (5, 15)], [(8, 12), (9, 30)]) == 7
    assert common([(0, 5)], [(5, 9)]) == 0


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile(range(1, 101), share) for share in (0.5, 0.99, 1)] == [50, 99, 100]
    assert percentile([7.0], 0.5) == 7
    assert mean([]) == 0


def test_a_stage_that_goes_back_is_counted() -> None:
    order = ["received", "parsed", "indexed"]
    assert backwards(["received", "parsed", "parsed", "indexed"], order) == 0
    assert backwards(["parsed", "received", "indexed", "parsed"], order) == 2


def test_fixed_chunks_have_a_size_an_overlap_and_leave_nothing_out() -> None:
    text = "A  word\nand another " * 400
    chunks = _fixed(text, lambda texts: [len(one.split()) for one in texts])

    assert all(chunk.text == text[chunk.start : chunk.end] for chunk in chunks)
    assert (chunks[0].start, chunks[-1].end) == (0, len(text))
    sizes = [len(chunk.text.split()) for chunk in chunks]
    assert set(range(FIXED_TOKENS - 2, FIXED_TOKENS + 1)) >= set(sizes[:-1])
    overlaps = [len(text[right.start : left.end].split()) for left, right in pairwise(chunks)]
    assert all(FIXED_TOKENS * FIXED_OVERLAP - 3 <= overlap <= FIXED_TOKENS * FIXED_OVERLAP for overlap in overlaps)


def test_a_word_larger_than_a_chunk_is_a_chunk() -> None:
    chunks = _fixed("huge huge", lambda texts: [1000] * len(texts))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 4), (5, 9)]


def test_the_middle_sentence_is_from_the_middle_and_not_a_crumb() -> None:
    text = "First. Second. Ok. The longest one stands in the middle. Five. Six six six. The last one is longer than all before, by far"
    assert middle_sentence(text) == "The longest one stands in the middle"
    assert middle_sentence("alone") == "alone"


def test_bombs_are_what_their_names_say() -> None:
    made = bombs()
    with zipfile.ZipFile(BytesIO(made["zip-1000-to-1.docx"])) as archive:
        (entry,) = archive.infolist()
        assert entry.file_size > 900 * entry.compress_size
    assert all(len(content) < 20 * 1024 * 1024 for content in made.values()), "too large to be taken at all"
    assert made["zip-100000-entries.docx"].count(b"PK\x01\x02") == ENTRIES + 1
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(BytesIO(made["cut-short.docx"]))

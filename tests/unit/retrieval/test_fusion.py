"""How two rankings become one."""

import pytest

from services.retrieval.fusion import familiarity, fused


def ranking(**scores: float) -> dict[str, float]:
    return scores


@pytest.mark.parametrize("mode", ["linear", "dbsf", "rrf"])
def test_what_both_rankings_name_comes_first(mode: str) -> None:
    """And each candidate says where each ranking had it."""
    best, *others = fused(ranking(meaning=0.9, both=0.8, far=0.1), ranking(words=9.0, both=8.0, off=1.0), 0.5, mode)

    assert ("both", 2, 0.8, 2, 8.0) == (best.id, best.dense_rank, best.dense_score, best.sparse_rank, best.sparse_score)
    assert {"meaning", "words", "far", "off"} == {other.id for other in others}
    assert all((other.dense_rank is None) != (other.sparse_rank is None) for other in others)


def test_what_was_added_is_told_where_it_was() -> None:
    """In the unit of words; ranks and spreads have none, and one ranking alone is not added to."""
    dense, sparse = ranking(both=0.5, far=0.1), ranking(both=9.0, off=1.0)
    both = fused(dense, sparse, 0.25, worth=60.0)[0]

    assert 0.25 * 60 * 0.5 + 0.75 * 9 == both.total
    assert {None} == {hit.total for mode in ("dbsf", "rrf") for hit in fused(dense, sparse, 0.25, mode)}
    assert {None} == {hit.total for hit in fused(dense, {}, 1.0)}


def test_a_ranking_without_weight_orders_nothing() -> None:
    """Where the embedder knows no word of the language, the order is that of the words."""
    hits = fused(ranking(c=0.9, a=0.5, x=0.4), ranking(a=3.0, b=2.0, c=1.0), 0.0)

    assert ["a", "b", "c"] == [hit.id for hit in hits][:3]


def test_a_unit_of_cosine_is_worth_so_much_in_words() -> None:
    """However far apart the others of a ranking are, and however many words the question has."""
    dense = ranking(near=0.7, far=0.6, others=0.1)

    def first(words: float, worth: float) -> str:
        return fused(dense, ranking(far=words, near=1.0), 0.5, brought=2, worth=worth)[0].id

    assert ("near", "far") == (first(1.0 + 5.9, 60.0), first(1.0 + 6.1, 60.0))
    assert ("near", "far") == (first(1.0 + 2.9, 30.0), first(1.0 + 3.1, 30.0))


def test_who_is_missing_in_a_ranking_that_was_cut_may_be_as_good_as_its_last() -> None:
    """In one that holds all there is it has none of the words."""
    dense, sparse = ranking(meant=0.7, said=0.5), ranking(said=9.0, other=8.0)
    order = {brought: [hit.id for hit in fused(dense, sparse, 0.5, brought=brought, worth=20.0)] for brought in (2, 3)}

    assert order == {2: ["meant", "said", "other"], 3: ["said", "other", "meant"]}


def test_the_order_of_an_embedder_nobody_has_measured_follows_its_own_spread() -> None:
    """Some embedders call everything alike: what tells candidates apart counts, and not how little that is."""
    sparse = ranking(b=3.0, a=2.0, d=1.0)
    narrow, wide = ranking(a=0.802, b=0.801, c=0.8), ranking(a=0.6, b=0.5, c=0.4)

    assert [hit.id for hit in fused(narrow, sparse, 0.5)] == [hit.id for hit in fused(wide, sparse, 0.5)]


def test_rankings_of_one_or_of_equals_do_not_divide_by_nothing() -> None:
    """No spread says nothing; ties go by id, whatever order they came in."""
    assert ["a", "b"] == [hit.id for hit in fused(ranking(b=1.0, a=1.0), {}, 0.5)]
    assert ["a"] == [hit.id for hit in fused({}, ranking(a=1.0), 0.5)]
    assert [] == fused({}, {}, 0.5)
    # The mean of three times 0.1 is not 0.1 in binary: that must not pass for a spread.
    assert [0.25] * 3 == [hit.score for hit in fused(ranking(a=0.1, b=0.1, c=0.1), {}, 0.5)]
    assert [0.25] * 2 == [hit.score for hit in fused(ranking(a=0.0, b=5e-324), {}, 0.5)]


@pytest.mark.parametrize("mode", ["linear", "dbsf", "rrf"])
def test_the_best_few_are_the_first_of_all(mode: str) -> None:
    """As they are when every candidate is asked for."""
    dense = ranking(**{f"d{number % 7}{number}": 1 / (1 + number) for number in range(40)}, both=0.3)
    sparse = ranking(both=5.0, **{f"d{number % 7}{number}": float(30 - number) for number in range(20, 30)}, a=1.0, b=1.0)
    every = fused(dense, sparse, 0.4, mode)

    assert len({**dense, **sparse}) == len(every)
    assert every[:12] == fused(dense, sparse, 0.4, mode, most=12)
    assert sorted(every, key=lambda hit: (-hit.score, hit.id)) == every


@pytest.mark.parametrize(("characters", "pieces", "known"), [(40, 10, 1.0), (10, 10, 0.0), (24, 10, 0.5), (25, 1, 0.0), (0, 0, 0.0)])
def test_a_language_is_known_by_the_length_of_its_pieces(characters: int, pieces: int, known: float) -> None:
    """Words, letters, syllables, one unknown piece for a whole sentence, and nothing at all."""
    assert known == pytest.approx(familiarity(characters, pieces))

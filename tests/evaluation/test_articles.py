"""Articles where they are needed, on counts small enough to be made by hand."""

import pytest

from tinystories_jax.errors import UserError
from tinystories_jax.evaluation.articles import ArticleReference, count_articles, find_absent, find_gaps, score_articles

STORY = ["There was a cat in the garden.", "The cat saw her dog and a bird.", "Her dog was happy."]


@pytest.fixture(scope="module")
def reference() -> ArticleReference:
    return count_articles([STORY] * 50)


def words_without(sentence: str, reference: ArticleReference) -> list[str]:
    return [sentence[start:end] for start, end in find_absent(sentence, reference)]


def test_a_gap_lies_before_each_word_that_is_no_article():
    gaps = list(find_gaps('"Look!" The cat sat.'))
    assert [(gap.previous, gap.word, gap.after, gap.has_article) for gap in gaps] == [
        (".", "look", ".", False),
        (".", "cat", "sat", True),
        ("cat", "sat", ".", False),
    ]
    assert ['"Look!" The cat sat.'[gap.start : gap.end] for gap in gaps] == ["Look", "cat", "sat"]


def test_two_articles_fill_one_gap_and_an_article_without_a_word_fills_none():
    assert [gap.has_article for gap in find_gaps("The a cat sat on the.")] == [True, False, False]


@pytest.mark.parametrize(
    ("sentence", "absent"),
    [
        ("There was a cat in the garden.", []),
        ("There was cat in the garden.", ["cat"]),
        ("There was cat in garden.", ["cat", "garden"]),
        ("Cat saw her dog and bird.", ["Cat", "bird"]),
        ("Her dog was happy.", []),
        ("The an a the.", []),
        ("", []),
    ],
)
def test_an_absent_article_is_found_where_the_reference_always_has_one(reference, sentence, absent):
    assert words_without(sentence, reference) == absent


def test_the_word_after_next_decides_where_the_next_alone_does_not():
    stories = [["She saw the little bird.", "She saw little Ann."]] * 50
    reference = count_articles(stories)
    assert words_without("She saw little bird.", reference) == ["little"]
    assert words_without("She saw little Ann.", reference) == []


def test_unknown_words_need_no_article(reference):
    assert words_without("Zyx quux blorb.", reference) == []


def test_counts_of_a_story(reference):
    counts = score_articles([STORY, ["There was cat.", "Her the dog was happy."], []], reference)
    assert counts.words.tolist() == [19, 8, 0]
    assert counts.articles.tolist() == [4, 1, 0]
    assert counts.needed.tolist() == [4, 1, 0]
    assert counts.filled.tolist() == [4, 0, 0]
    assert counts.unlikely.tolist() == [0, 1, 0]
    # In the reference's own words, as many articles as were counted there.
    assert counts.expected[0] == pytest.approx(4, rel=0.1)


def test_the_guards_tell_articles_put_before_every_word(reference):
    greedy = score_articles(
        [["The there the was the cat in the the garden.", "The her the dog the was the happy."]], reference
    )
    assert greedy.filled.sum() == greedy.needed.sum()
    assert greedy.articles.sum() > 1.7 * greedy.expected.sum()
    assert greedy.unlikely.sum() > 0.5 * greedy.articles.sum()


def test_stories_without_an_article_are_no_reference():
    for stories in ([], [[]], [["Her dog was happy."]]):
        with pytest.raises(UserError, match="no reference"):
            count_articles(stories)

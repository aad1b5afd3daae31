"""Words of many languages find themselves, and the inverted index scores as the formula says after any change."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralflow_memory.errors import InputError
from neuralflow_memory.rules import postings
from neuralflow_memory.rules.lexical import MAX_WORD, STOP_WORDS, term_ids, tokens
from neuralflow_memory.rules.postings import Postings

GERMAN = "Ich habe {} gesehen und wir sind nicht nach Hause gegangen"
FRENCH = "Je ne sais pas où est {} dans cette ville, mais nous avons du temps"
SPANISH = "No sé dónde está {} pero también tengo una casa en la ciudad"
ENGLISH = "We should have seen {} when they were at home"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada's cats doesn't like the rain", ["ada", "cat", "like", "rain"]),
        ("Ada’s state-of-the-art snake_case", ["ada", "state", "art", "snake", "case"]),
        ("It costs 1,234.50 or 3.5", ["cost", "1234.50", "3.5"]),
        ("2024-05-03 and 03.05.2024", ["2024", "05", "03", "03", "05", "2024"]),
        ("rooms 1,2,3", ["room", "1", "2", "3"]),
        ("at 10:30am, 3.5kg.", ["10", "30am", "3.5", "kg"]),
        ("ＦＵＬＬ width ﬁ", ["full", "width", "fi"]),
        ("co\u00adoperate", ["cooper"]),
        ("the of and", []),
        ("", []),
        ("😀 — …", []),
        ("\ud800", []),
        ("don't can't won't I'm you'll", []),
        ("猫", ["猫"]),
        ("東京都", ["東", "東京", "京", "京都", "都"]),
        ("タワー", ["タワ", "ワー"]),
        ("서울 강", ["서울", "강"]),
        ("ไทย", ["ไท", "ทย"]),
        ("iPhone15を買う", ["iphone15", "を買", "買", "買う"]),
    ],
)
def test_texts_fall_into_terms(text, expected):
    """Words, numbers, dates and unspaced scripts are cut as documented."""
    assert tokens(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("planning", "planned"),
        ("naïve café", "naive cafe"),
        ("книгами", "книга"),
        ("Ёлка", "елка"),
        ("İstanbul", "istanbul"),
        ("Straße", "STRASSE"),
        ("हिन्दी", "हिन्दी\u200d"),
        ("θάλασσας", "ΘΑΛΑΣΣΑ"),
        ("الكتاب", "كتاب"),
        ("don’t panic", "don't panic"),
    ],
)
def test_spellings_of_a_word_meet(one, other):
    """Inflection, accents, case, apostrophes and joiners don't keep a word from itself."""
    assert tokens(one) == tokens(other) != []


@pytest.mark.parametrize(
    ("frame", "said", "asked"),
    [(GERMAN, "die Häuser", "Haus"), (FRENCH, "les chevaux", "cheval"), (SPANISH, "las canciones", "canción")],
)
def test_other_languages_meet_their_inflections(frame, said, asked):
    """In a text that is surely German, French or Spanish, a word is found by its other forms."""
    assert set(tokens(asked)) & set(tokens(frame.format(said)))


@given(
    st.text(alphabet="abcdefghijklmnopqrstuvwxyzäöüßéèñçåø", min_size=1, max_size=12),
    st.sampled_from([GERMAN, FRENCH, SPANISH, ENGLISH, "{}"]),
)
def test_a_latin_word_finds_itself_whatever_surrounds_it(word, frame):
    """A short query guesses another language than the text it looks for, and still meets it."""
    assert set(tokens(word)) <= set(tokens(frame.format(word)))


@given(st.text(), st.text())
def test_any_text_is_cut_the_same_way_twice(one, other):
    """Tokens are never empty nor unbounded, and texts in one line don't change each other's numbers of terms to none."""
    terms = tokens(one)
    assert terms == tokens(one)
    assert all(0 < len(term) <= 2 * MAX_WORD for term in terms)
    if terms:
        assert tokens(f"{one} {other}")


def test_stop_words_alone_leave_nothing():
    """Every word of the stop list is dropped, by itself and among others."""
    assert tokens(" ".join(sorted(STOP_WORDS))) == []
    assert [word for word in STOP_WORDS if tokens(word)] == []


def test_words_are_bounded():
    """A pasted key costs one bounded term."""
    (term,) = tokens("x1" * 5000)
    assert len(term) == MAX_WORD
    assert len(tokens("7" * 5000 + ".5")[0]) == MAX_WORD


def test_ids_are_keyed_stable_and_in_order():
    """An id depends on the word and the key only; repeats stay."""
    ids = term_ids("cat dog cats")
    assert ids.dtype == np.uint32
    assert ids[0] == ids[2] != ids[1]
    assert ids.tolist() == term_ids("cat dog cats").tolist()
    assert not set(ids.tolist()) & set(term_ids("cat dog cats", key=b"secret").tolist())
    assert int(term_ids("cat")[0]) == 0xBB128B6A
    assert term_ids("").shape == (0,)


def test_threads_stem_alike():
    """Stemming from many threads at once gives what one thread gives."""
    texts = [f"{GERMAN.format(f'laufen{i}ungen')} running{i}ings" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: term_ids(text, key=b"t").tolist(), texts))
    assert together == [term_ids(text, key=b"t").tolist() for text in texts]


def naive(docs, query, *, alive=None, k1=1.2, b=0.75):
    """BM25 as the formula reads. `docs` holds lists of ids, or None where removed."""
    live = {i: Counter(doc) for i, doc in enumerate(docs) if doc is not None and (alive is None or alive[i])}
    scores = [0.0] * len(docs)
    if not live:
        return scores
    average = sum(sum(doc.values()) for doc in live.values()) / len(live)
    for term in set(query):
        df = sum(term in doc for doc in live.values())
        idf = math.log(1 + (len(live) - df + 0.5) / (df + 0.5))
        for i, doc in live.items():
            if tf := doc[term]:
                length = sum(doc.values())
                scores[i] += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / average))
    return scores


# Few terms, so that documents share them; the largest id, so that no bit is lost.
terms = st.integers(0, 6) | st.just(2**32 - 1)
documents = st.lists(terms, max_size=8)
changes = st.lists(
    st.tuples(st.sampled_from(["append", "append", "replace", "remove"]), st.integers(0, 60), documents), max_size=40
)


def after(index, docs, steps):
    for what, number, ids in steps:
        if what == "append":
            assert index.append(ids) == len(docs)
            docs.append(ids)
        elif docs and what == "replace":
            index.replace(number % len(docs), ids)
            docs[number % len(docs)] = ids
        elif docs:
            index.remove(number % len(docs))
            docs[number % len(docs)] = None


def built(docs):
    return Postings.build(np.array([t for doc in docs for t in doc], np.uint32), [len(doc) for doc in docs])


def agrees(index, docs, query, alive):
    mask = None if alive is None else np.array([alive[i % len(alive)] for i in range(len(docs))], np.bool_)
    scores = index.bm25(query, alive=mask)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(index.bm25(index.matches(query, alive=mask)), scores)
    np.testing.assert_allclose(scores, naive(docs, query, alive=mask), rtol=1e-5, atol=1e-5)
    assert [index.ids_of(i).tolist() for i in range(len(index))] == [doc or [] for doc in docs]


@pytest.mark.parametrize("merging", [False, True])
@given(
    start=st.lists(documents, max_size=12),
    steps=changes,
    query=st.lists(terms, max_size=6),
    alive=st.none() | st.lists(st.booleans(), min_size=1, max_size=7),
)
@settings(deadline=None)
def test_any_history_scores_as_the_formula_says(merging, start, steps, query, alive):
    """Built, appended, replaced, removed, merged or not: scores and forward view equal a naive BM25's."""
    index, docs = built(start), [list(doc) for doc in start]
    index.merge_at = 3 if merging else 10**6
    after(index, docs, steps)
    agrees(index, docs, query, alive)


def test_a_grown_index_equals_a_built_one():
    """Thousands of appends, with the real merge threshold, give the scores of building in one go."""
    rng = np.random.default_rng(7)
    docs = [rng.zipf(1.3, rng.integers(0, 30)).clip(max=2000).tolist() for _ in range(3000)]
    grown = built([])
    for doc in docs:
        grown.append(doc)
    for i in range(0, 3000, 3):
        grown.replace(i, docs[i][::-1])
        docs[i].reverse()
    whole = built(docs)
    for query in ([1, 2, 3], [5, 1999], [2**31]):
        np.testing.assert_allclose(grown.bm25(query), whole.bm25(query), rtol=1e-5)
    assert grown.ids_of(3).tolist() == docs[3]
    assert grown.nbytes < 3 * whole.nbytes


def test_removed_documents_leave_no_trace():
    """After removal no score counts the document, and its terms can't be read back; after a merge nothing of it is held."""
    index = built([[11, 12], [12, 13]])
    late = index.append([77, 78])
    index.remove(0)
    index.remove(late)
    index.remove(late)
    only = built([[12, 13]])
    assert index.bm25([11, 12, 77]).tolist() == [0, only.bm25([12])[0], 0]
    assert not {11, 77, 78} & set(index._ids.tolist())
    assert index.ids_of(0).tolist() == []
    index.merge_at = 0
    index.append([5])
    assert index._terms.tolist() == [5, 12, 13]


def test_replacing_again_and_again_takes_no_more_room():
    """What replaced documents leave behind is reclaimed."""
    index = built([[1, 2, 3]] * 5)
    index.merge_at = 64
    for i in range(2000):
        index.replace(i % 5, list(range(i, i + 30)))
    assert index.nbytes < 20_000
    assert index.ids_of(4).tolist() == list(range(1999, 2029))


def test_what_is_no_id_changes_nothing():
    """A refused append or replace leaves the index as it was."""
    index = built([[1, 2]])
    for change in (lambda: index.append([-1]), lambda: index.replace(0, [2**32])):
        with pytest.raises(OverflowError):
            change()
    assert len(index) == 1
    assert index.ids_of(0).tolist() == [1, 2]


def test_a_query_term_counts_once():
    """Repeats in the query don't weigh."""
    index = built([[1, 2], [2, 3]])
    assert index.bm25([1, 1, 1, 2]).tolist() == index.bm25([2, 1]).tolist()


def test_wrong_shapes_are_refused():
    """Lengths that don't fit the ids, flags that don't fit the documents, and unknown documents raise."""
    with pytest.raises(InputError):
        Postings.build(np.zeros(3, np.uint32), [1, 1])
    with pytest.raises(InputError):
        built([[1]]).bm25([1], alive=np.ones(2, np.bool_))
    with pytest.raises(IndexError):
        built([[1]]).remove(1)
    with pytest.raises(IndexError):
        built([[1]]).ids_of(-1)


# -- neighbours


def naive_around(documents, neighbours, terms, alive, rows):
    """BM25 over what each document and its neighbours say together, with a guess at how many of those have a common term."""
    joined = []
    for row in range(len(documents)):
        together = [row, *(int(there[row]) for there in neighbours if there[row] >= 0)]
        joined.append([t for r in together if alive[r] for t in documents[r]])
    lengths = [len(joined[row]) for row in rows if alive[row]]
    number = int(sum(alive))
    scores = []
    for document, live in ((joined[row], alive[row]) for row in rows):
        score = 0.0
        for term in set(terms):
            tf = document.count(term)
            df = sum(term in d for d, there in zip(documents, alive, strict=True) if there)
            if df > len(rows):
                df = number * (1 - (1 - df / number) ** (1 + len(neighbours)))
            else:
                df = sum(term in d for d, there in zip(joined, alive, strict=True) if there)
            if tf and live:
                norm = 1.2 * (0.25 + 0.75 * len(document) / (sum(lengths) / len(lengths)))
                score += math.log(1 + (number - df + 0.5) / (df + 0.5)) * tf * 2.2 / (tf + norm)
        scores.append(score)
    return scores


@pytest.mark.parametrize("some", [40, 4], ids=["all", "some"])
@pytest.mark.parametrize("late", [False, True], ids=["built", "appended"])
@pytest.mark.parametrize("few", [0, 2048])
def test_around_is_bm25_of_a_document_with_its_neighbours(late, some, few, monkeypatch):
    """Whether the documents were there at first or came later, and with some that don't count; of all, or of a few."""
    monkeypatch.setattr(postings, "_FEW", few)
    rng = np.random.default_rng(5)
    documents = [rng.integers(1, 12, rng.integers(0, 9)).tolist() for _ in range(40)]
    index = Postings() if late else built(documents)
    for document in documents if late else ():
        index.append(document)
    before, after = np.arange(-1, 39), np.append(np.arange(1, 40), -1)
    before[20], after[19] = -1, -1  # another session begins
    neighbours = [before, after]
    alive = rng.random(40) < 0.8
    terms = [1, 2, 3, 99]
    rows = np.arange(40)[-some:]

    def beside(these):
        return [np.where(these >= 0, there[these], -1) for there in neighbours]

    found = index.around(index.matches(terms, alive=alive), beside, rows)
    assert index.around(terms, beside, rows, alive=alive).tolist() == found.tolist()
    assert found.tolist() == pytest.approx(naive_around(documents, neighbours, terms, alive, rows), rel=1e-4)
    everything = np.ones(40, bool)
    assert index.around(terms, beside, rows).tolist() == pytest.approx(
        naive_around(documents, neighbours, terms, everything, rows), rel=1e-4
    )


def test_around_takes_the_rarest_terms_of_a_long_query():
    """So that a pasted page costs no more than a question; what is rare says most."""
    documents = [[1000 + row, *range(60)] for row in range(8)]
    index = built(documents)
    rows = np.arange(8)
    scores = index.around([*range(60), 1003], lambda _: [], rows)
    assert scores.argmax() == 3
    assert index.around([777], lambda _: [], rows).tolist() == [0.0] * 8

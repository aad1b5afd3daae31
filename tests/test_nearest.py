"""Vectors of a large scope in eight bits a number: cosines, neighbours, and what comes after they were compressed."""

import numpy as np
import pytest

from neuralflow_memory.rules.nearest import Vectors


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def like_texts(rng, rows, *, dimensions=384, topics=60):
    """Vectors as of texts: around topics, and all of them a little alike."""
    centers = rng.standard_normal((topics, dimensions)) + 0.6 * rng.standard_normal(dimensions)
    return unit(centers[rng.integers(0, topics, rows)] + rng.standard_normal((rows, dimensions)))


def held(vectors, *, most_exact):
    found = Vectors(vectors.shape[1], rows=len(vectors), most_exact=most_exact)
    for row, vector in enumerate(vectors):
        found.put(row, vector)
    return found


def test_few_are_exact():
    """The cosines are those of the vectors themselves."""
    rng = np.random.default_rng(1)
    vectors = like_texts(rng, 200)
    few = held(vectors, most_exact=200)
    assert few.exact
    question = unit(rng.standard_normal(384))
    assert np.array_equal(few.cosines(question), vectors @ question)
    among = np.arange(200) % 3 > 0
    expected = set(np.flatnonzero(among)[np.argsort(-(vectors @ question)[among])[:10]].tolist())
    assert set(few.nearest(question, k=10, among=among).tolist()) == expected


def test_it_does_not_matter_along_which_axes_they_differ():
    """Where a few dimensions say nearly all, the bits of the others would be noise."""
    rng = np.random.default_rng(6)
    vectors = unit(rng.standard_normal((20_000, 384)) * np.arange(1, 385) ** -0.5)
    many = held(vectors, most_exact=1000)
    hits = 0
    for row in rng.integers(0, 20_000, 20):
        nearest = many.nearest(vectors[row], k=10, among=np.ones(20_000, bool))
        hits += len(set(nearest.tolist()) & set(np.argsort(-(vectors @ vectors[row]))[:10].tolist()))
    assert hits / 200 > 0.9


@pytest.mark.parametrize(("dimensions", "off"), [(384, 0.003), (100, 0.006), (7, 0.02)])
def test_many_are_nearly_so(dimensions, off):
    """About a quarter of the room, cosines off by some thousandths, whether they came before or after the limit was passed."""
    rng = np.random.default_rng(2)
    vectors = like_texts(rng, 3000, dimensions=dimensions)
    many = Vectors(dimensions, rows=64, most_exact=1000)
    for row, vector in enumerate(vectors):
        if row == len(many):
            many.resize(2 * row)
        many.put(row, vector)
    assert not many.exact
    assert many.nbytes <= (dimensions + dimensions / 8 + 12) * len(many) + 4 * dimensions**2
    question = unit(vectors[17] + 0.5 * unit(rng.standard_normal(dimensions)))
    assert np.abs(many.cosines(question)[:3000] - vectors @ question).max() < off
    assert np.abs(many.of(np.arange(3000)) - vectors).max() < off


def test_the_nearest_are_found_by_their_bits():
    """Of 20,000, a twenty-fifth is looked at closely; hardly one of the true ten is missed."""
    rng = np.random.default_rng(3)
    vectors = like_texts(rng, 20_000)
    many = held(vectors, most_exact=1000)
    hits = 0
    for row in rng.integers(0, 20_000, 40):
        question = unit(vectors[row] + 0.7 * unit(rng.standard_normal(384)))
        nearest = many.nearest(question, k=10, among=np.ones(20_000, bool))
        hits += len(set(nearest.tolist()) & set(np.argsort(-(vectors @ question))[:10].tolist()))
    assert hits / 400 > 0.95


def test_only_those_that_count_are_found_and_zeros_are_far():
    """A vector that was taken out is near to nothing; of less than asked for, all are given."""
    rng = np.random.default_rng(4)
    vectors = like_texts(rng, 500)
    many = held(vectors, most_exact=10)
    among = np.zeros(500, bool)
    among[[3, 40, 77]] = True
    assert many.nearest(vectors[3], k=10, among=among).tolist() == [3, 40, 77]
    assert many.nearest(vectors[3], k=1, among=among).tolist() == [3]
    many.put(3, np.zeros(384, np.float32))
    assert many.cosines(vectors[3], np.array([3])).tolist() == [0.0]
    assert not many.nearest(vectors[3], k=10, among=np.zeros(500, bool)).size

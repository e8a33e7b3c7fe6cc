from __future__ import annotations

import pytest

from was_search.studies.fitness import FITNESSES, fitness_identity, fitness_of, fitness_words


def test_perplexity_is_of_the_nll_whatever_the_fitness():
    assert fitness_words("nll", 1.25, 1.25) == "1.2500 nats per token, perplexity 3.490"
    assert fitness_words("kl", 0.5, 1.25) == "0.5000 nats of KL per token, perplexity 3.490"
    assert fitness_words("kl", 0.5, None) == "0.5000 nats of KL per token"


@pytest.mark.parametrize("fitness", FITNESSES)
def test_the_identity_names_the_fitness(fitness):
    assert fitness_of({"target": 0.6, **fitness_identity(fitness, 64)}) == fitness


def test_top_k_is_part_of_a_kl_study_alone():
    assert fitness_identity("nll", 64) == fitness_identity("nll", 16) == {"fitness": "nll"}
    assert fitness_identity("kl", 64) == {"fitness": "kl, dense top 64"}

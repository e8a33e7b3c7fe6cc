from __future__ import annotations

import inspect
import re

import pytest

from was_search import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
KINDS = (errors.InfeasibleError, errors.TransientError, errors.WrongInputError)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_of_one_kind_and_a_builtin(kind):
    if kind is errors.WasError:
        return
    assert sum(issubclass(kind, k) for k in KINDS) == 1
    assert issubclass(kind, (ValueError, RuntimeError))


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__ or ""))
    assert drawn == {c.__name__ for c in CLASSES}

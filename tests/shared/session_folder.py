"""Folders that live as long as the session of pytest, for models that many tests share through a cache."""

from pathlib import Path

import pytest

_factories: list[pytest.TempPathFactory] = []


def begin(factory: pytest.TempPathFactory) -> None:
    """Say where; conftest does it before the first test."""
    _factories.append(factory)


def new_folder(name: str) -> Path:
    """An empty folder that pytest removes."""
    return _factories[-1].mktemp(name)

"""What the tests of retrieval share: a tiny encoder, documents and an index, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("bm25s")
pytest.importorskip("snowballstemmer")

import retrieve_models as tiny  # noqa: E402


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoder, documents, and an index of them."""
    from foveate.retrieve.build import run

    folder = tmp_path_factory.mktemp("retrieve")
    tiny.encoder(folder / "encoder")
    tiny.documents(folder / "documents")
    run(tiny.job(folder), lambda share, doing: None)
    return folder


@pytest.fixture
def place(tmp_path: Path, made: Path) -> Path:
    """A folder of the test's own with the same encoder and documents, without an index."""
    (tmp_path / "encoder").symlink_to(made / "encoder")
    tiny.documents(tmp_path / "documents")
    return tmp_path

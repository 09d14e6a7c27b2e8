"""Folders of the cache whose files are run are closed to others."""

import os

import pytest

from kairos_jax.process import cache
from kairos_jax.process.cache import (
    NotPrivate,
    cache_dir,
    cache_or_temporary,
    private_cache_dir,
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kairos_jax"


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_folder_is_made_for_its_owner_alone(home):
    before = os.umask(0)
    try:
        assert private_cache_dir("native") == home / "native"
    finally:
        os.umask(before)
    assert (mode(home), mode(home / "native")) == (0o700, 0o700)


def test_what_others_can_read_is_closed_to_them(home):
    (home / "xla").mkdir(parents=True)
    home.chmod(0o755)
    (home / "xla").chmod(0o755)
    private_cache_dir("xla")
    assert (mode(home), mode(home / "xla")) == (0o700, 0o700)


@pytest.mark.parametrize("open_to", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("which", ["", "native"])
def test_what_others_can_write_is_not_trusted(home, open_to, which):
    (home / "native").mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    (home / which).chmod(open_to)
    with pytest.raises(NotPrivate, match=r"others can write to it.*XDG_CACHE_HOME"):
        private_cache_dir("native")
    assert mode(home / which) == open_to


def test_a_cache_that_cannot_be_made_is_named(home):
    home.write_text("a file")
    with pytest.raises(NotPrivate, match=r"kairos_jax.*XDG_CACHE_HOME names another place"):
        private_cache_dir("native")


def test_a_cache_that_is_only_read_is_named(home, monkeypatch):
    home.mkdir()
    monkeypatch.setattr(cache.os, "access", lambda path, how: False)  # as root, all can be written
    with pytest.raises(NotPrivate, match=r"cannot be written to; XDG_CACHE_HOME names another"):
        private_cache_dir("native")


def test_without_a_cache_a_folder_is_there_for_a_while(home, caplog):
    home.write_text("a file")
    with cache_or_temporary("native") as folder:
        assert folder.is_dir()
        assert home not in folder.parents
    assert not folder.exists()
    assert "nothing is kept for later starts: " in caplog.text
    assert "XDG_CACHE_HOME names another place" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", none)
    assert str(cache_dir("xla")) == "/.cache/kairos_jax/xla"

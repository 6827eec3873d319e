"""What a worker does about Python's collector while it imports."""

from __future__ import annotations

import gc

import pytest

from shoal.worker import __main__ as worker_main


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_come_and_what_came_is_not_walked_again():
    with worker_main.nothing_collected():
        assert not gc.isenabled()
        came = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(came)
    known = {id(each) for each in gc.get_objects()}
    assert not known & {id(each) for each in came}


def test_it_is_collected_again_after_an_import_that_failed():
    with pytest.raises(ImportError), worker_main.nothing_collected():
        raise ImportError
    assert gc.isenabled()

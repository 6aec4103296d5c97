"""Tests that pytest-xdist sends the tests of a group to one worker."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="runs under pytest-xdist only")
@pytest.mark.xdist_group("grouped")
def test_a_group_is_part_of_the_id_by_which_tests_are_sent(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@grouped")

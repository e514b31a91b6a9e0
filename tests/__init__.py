"""The tests, and what they share: strategies, an enumerable policy, properties."""

import pytest

pytest.register_assert_rewrite("tests.properties", "tests.enumeration")

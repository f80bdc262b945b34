"""Prompts from the held-out files of the standard library."""

import pytest

from layerskip_recipes.data.standard_library import heldout_prompts
from layerskip_recipes.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def few_texts():
    """Here they are all read."""


def test_prompts_have_the_length_asked_for():
    prompts = heldout_prompts(count=3, characters=200)
    assert [len(prompt) for prompt in prompts] == [200] * 3 and len({*prompts}) == 3
    assert all(prompt.rstrip().endswith(":") for prompt in prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, r"^prompts\.count: 0 "),
        ({"count": 9999}, r"^prompts\.count: 9999 .* of 1 to \d+; for example "),
        ({"characters": 10**9}, r"^prompts\.count: 8 .*of 1 to 0"),
    ],
)
def test_a_wrong_count_is_refused_by_its_key(arguments, message):
    with pytest.raises(ConfigError, match=message):
        heldout_prompts(**arguments)

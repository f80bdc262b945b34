"""The quickstart's prompts: what may be asked for. Its data and tokenizer serve the other tests."""

import pytest

from layerskip_recipes.data.standard_library import heldout_prompts


def test_prompts_have_the_length_asked_for():
    prompts = heldout_prompts(count=3, characters=200)
    assert [len(prompt) for prompt in prompts] == [200] * 3 and len({*prompts}) == 3
    assert all(prompt.rstrip().endswith(":") for prompt in prompts)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"count": 0}, "^prompts.count: 0 .* of 1 or more; for example prompts.count=8$"),
        ({"count": -1}, "^prompts.count: -1 .* of 1 or more"),
        ({"count": 2.5}, "^prompts.count: 2.5 .*an integer"),
        ({"count": 9999}, r"^prompts.count: 9999 .* of 1 to \d+; for example prompts.count=8$"),
        ({"characters": 0}, "^prompts.characters: 0 .* of 1 or more; for example prompts.characters=450$"),
        (
            {"characters": 10**9},
            "^prompts.characters: 1000000000 is too long for all held-out files; for example prompts.characters=450$",
        ),
    ],
)
def test_mistakes(asked, message):
    with pytest.raises(ValueError, match=message):
        heldout_prompts(**asked)

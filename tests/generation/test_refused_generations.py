"""What `generate` refuses, in one line each."""

import pytest
import torch
from helpers.decoding import model_of

from layerskip_recipes.generation.api import generate


@pytest.mark.parametrize(
    ("message", "prompt", "arguments"),
    [
        ("prompt: ", [], {}),
        ("prompt: ", [[1, 2], []], {}),
        ("max_generated_tokens: 0", [[1]], {"max_generated_tokens": 0}),
        ("max_generated_tokens: -3", [[1]], {"max_generated_tokens": -3}),
        ("max_generated_tokens: 2.5", [[1]], {"max_generated_tokens": 2.5}),
        ("max_generated_tokens: .*more than the model's 128", [[1]], {"max_generated_tokens": 128}),
        ("max_generated_tokens: .*more than the model's 128", [[1], [1] * 125], {}),
        ("num_speculations: 0", [[1]], {"exit_layer": 2, "num_speculations": 0}),
        ("num_speculations: True", [[1]], {"exit_layer": 2, "num_speculations": True}),
        ("num_speculations.* exit_layer", [[1]], {"num_speculations": 2}),
        ("exit_layer: 0", [[1]], {"exit_layer": 0}),
        ("exit_layer: 7", [[1]], {"exit_layer": 7, "num_speculations": 2}),
        ("temperature: -1", [[1]], {"temperature": -1}),
        ("top_k: 0", [[1]], {"top_k": 0}),
        ("top_p: 0", [[1]], {"top_p": 0}),
    ],
)
def test_what_cannot_be_generated_is_refused(message, prompt, arguments):
    prompt = [torch.tensor(row, dtype=torch.long) for row in prompt]
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(model_of("llama3_2"), prompt, **{"max_generated_tokens": 4, **arguments})


def test_a_row_of_padding_only_is_no_prompt():
    with pytest.raises(ValueError, match=r"^prompt: "):
        generate(model_of("llama3_2"), torch.tensor([[1, 2], [0, 0]]), 4)


@pytest.mark.parametrize("arguments", [{"temp": 0.8}, {"exit_layer": 2, "num_speculations": 2, "prompt_lookpu": 2}])
def test_an_argument_that_nobody_knows_is_pythons_error(arguments):
    with pytest.raises(TypeError, match=list(arguments)[-1]):
        generate(model_of("llama3_2"), [1, 2], 4, **arguments)

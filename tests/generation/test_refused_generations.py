"""What `generate` refuses, in one line each: the argument, its value, what is allowed."""

import re

import pytest
import torch
from helpers.decoding import model_of

from layerskip_recipes.generation.api import generate

DRAFTS = {"exit_layer": 2, "num_speculations": 3}
COUNT, VOCABULARY = "an integer of 1 or more", "ids of 0..96"


@pytest.mark.parametrize(
    ("prompt", "arguments", "message", "allowed"),
    [
        ([], {}, "prompt: ", ""),
        ([[1, 2], []], {}, "prompt: ", ""),
        (torch.tensor([[1, 2], [0, 0]]), {}, "prompt: ", ""),  # a row of padding only
        ([[1, -1]], {}, "prompt: -1 is no token of this model. Allowed: 0..96", ""),
        ([[1.0, 2.5]], {}, "prompt: 1.0 is no token of this model. Allowed: 0..96", ""),
        ([[1]], {"max_generated_tokens": 0}, "max_generated_tokens: 0", ""),
        ([[1]], {"max_generated_tokens": 2.5}, "max_generated_tokens: 2.5", ""),
        ([[1]], {"max_generated_tokens": 128}, "max_generated_tokens: ", "more than the model's 128"),
        ([[1], [1] * 125], {}, "max_generated_tokens: ", "more than the model's 128"),
        ([[1]], {"stop_tokens": 2}, "stop_tokens: 2 is not allowed. Allowed: a list; for example [2]", ""),
        ([[1]], DRAFTS | {"num_speculations": 0}, "num_speculations: 0 ", f"{COUNT}; for example num_speculations=6"),
        ([[1]], DRAFTS | {"num_speculations": True}, "num_speculations: True ", COUNT),
        ([[1]], {"num_speculations": 2}, "num_speculations: 2 ", "exit_layer=8"),
        ([[1]], DRAFTS | {"prompt_lookup": 0}, "prompt_lookup: 0 ", f"{COUNT} (or null)"),
        ([[1]], {"exit_layer": 2, "prompt_lookup": 2}, "prompt_lookup: ", "num_speculations=6"),
        ([[1]], DRAFTS | {"draft_vocabulary": []}, "draft_vocabulary: no list ", VOCABULARY),
        ([[1]], DRAFTS | {"draft_vocabulary": [True, False]}, "draft_vocabulary: no list ", VOCABULARY),
        ([[1]], DRAFTS | {"draft_vocabulary": "abc"}, "draft_vocabulary: no list ", VOCABULARY),
        ([[1]], DRAFTS | {"draft_vocabulary": [1, 97]}, "draft_vocabulary: 97 ", VOCABULARY),
        ([[1]], DRAFTS | {"exit_layer": "2"}, "exit_layer: '2' ", "1..6"),
        ([[1]], DRAFTS | {"exit_layer": 7}, "exit_layer: 7 ", "1..6"),
        ([[1]], {"exit_layer": 0}, "exit_layer: 0", "1..6"),
        ([[1]], {"exit_layer": [1, 4]}, "exit_layer: [1, 4] ", "1..6"),
        ([[1]], {"temperature": -1}, "temperature: -1", ""),
        ([[1]], DRAFTS | {"temperature": 1.0, "min_p": 2}, "min_p: 2 ", "a number of 0 to 1"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty: 0 ", "a number above 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_what_is_allowed(prompt, arguments, message, allowed):
    if isinstance(prompt, list):
        prompt = [torch.tensor(row, dtype=torch.long if not row else None) for row in prompt]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*{re.escape(allowed)}"):
        generate(model_of("llama3_2"), prompt, **{"max_generated_tokens": 4, **arguments})


@pytest.mark.parametrize("arguments", [{"temp": 0.8}, {"exit_layer": 2, "num_speculations": 2, "prompt_lookpu": 2}])
def test_an_argument_that_nobody_knows_is_pythons_error(arguments):
    with pytest.raises(TypeError, match=list(arguments)[-1]):
        generate(model_of("llama3_2"), [1, 2], 4, **arguments)

"""Scores outputs against references: ROUGE, BLEU and exact match, each from 0 to 1.

ROUGE is the mean F-measure of lower-case words without stemming. BLEU is corpus BLEU-4 with SacreBLEU's 13a tokenizer
and no smoothing. torchmetrics computes both.
"""

from collections.abc import Sequence
from typing import Literal

from layerskip_recipes.data.chat_template import THINK
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.text.prompts import Example

Metric = Literal["rouge1", "rouge2", "rougeL", "bleu", "exact_match"]


def text_metrics(names: Sequence[Metric], outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """The metrics by name. `outputs` do not contain their prompts."""
    references = [example.response or "" for example in examples]
    answers = [_answer(output) for output in outputs]

    def metric(name: Metric) -> float:
        if name == "exact_match":
            same = [answer == _answer(reference) for answer, reference in zip(answers, references, strict=True)]
            return sum(same) / len(same)
        from torchmetrics.functional.text import rouge_score, sacre_bleu_score  # takes seconds to import

        if name == "bleu":
            return float(sacre_bleu_score(list(outputs), [[reference] for reference in references]))
        # Only this key: the default keys include one that needs nltk and its data.
        return float(rouge_score(list(outputs), list(references), rouge_keys=name)[f"{name}_fmeasure"])

    assert len(outputs) == len(examples) > 0, f"{len(outputs)} outputs, {len(examples)} examples"
    return {name: metric(name) for name in names}


def _answer(text: str) -> str:
    """A text without the space around it, and without the opening of a think block: some prompts already have it."""
    return text.strip().removeprefix(THINK).strip()


def check_references(names: Sequence[Metric], examples: Sequence[Example]) -> None:
    """Raise ConfigError if there are metrics and an example has no reference."""
    without = [at for at, example in enumerate(examples, 1) if example.response is None]
    if names and without:
        raise ConfigError(
            f"metrics: {', '.join(names)} needs references, and prompt {without[0]} of {len(examples)} has none. Give "
            '{"prompt": "text", "response": "text"} lines in prompt_file, or a component of layerskip_recipes.tasks as '
            "prompts; or metrics=null"
        )

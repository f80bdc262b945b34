"""Count how many tokens a round of looked-up drafts would give, if a model answered as test.jsonl does.

    python tools/replay_lookups.py HuggingFaceTB/SmolLM2-135M-Instruct my_data

my_data holds train.jsonl, whose answers are searched, and test.jsonl, both in the form of the `qa/*` configs. Only the
tokenizer of the model is read, and nothing is trained. Test answers that also occur in train.jsonl are left out. Each
answer is drafted and accepted as in `layerskip_generate`; the first token needs no round. Predictions of test.jsonl are
searched with the text. "drafted" is the mean number of drafted tokens, which end as on a CPU.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from layerskip_recipes import hf_tokenizer
from layerskip_recipes.checkpoint.answers import MOST_TOKENS, Answers, answers_of
from layerskip_recipes.data.replies import ReplyDataset, qa_dataset
from layerskip_recipes.generation.drafting.lookup import Lookup
from layerskip_recipes.generation.prefill import common_length
from layerskip_recipes.generation.text.prompts import predicted_tokens


def unseen(train: ReplyDataset, test: ReplyDataset) -> list[int]:
    """The test examples whose answers are not among those for training."""
    known = {example["response"] for example in train.examples}
    return [i for i, example in enumerate(test.examples) if example["response"] not in known]


def split(sample: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    start = next(i for i, label in enumerate(sample["labels"]) if label >= 0)
    return list(sample["tokens"][:start]), [token for token in sample["labels"][start:] if token >= 0]


def replay(texts: Sequence[tuple[list[int], list[int]]], count: int, least: int | None, answers: Answers | None) -> Any:
    """(tokens per round, drafted tokens per round) of drafts of at most `count` tokens."""
    rounds = tokens = drafted = 0
    for prompt, answer in texts:
        lookup, done = Lookup([*prompt, *answer[:1]], least, answers), 1
        while done < len(answer):
            found, _ = lookup.find(min(count, len(answer) - done))
            new = answer[done : done + 1 + common_length(found, answer[done:])]
            lookup.text.extend(new)
            done, rounds, tokens, drafted = done + len(new), rounds + 1, tokens + len(new), drafted + len(found)
    return tokens / max(rounds, 1), drafted / max(rounds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder, or a name on the hub")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--count", type=int, default=200, help="the number of test answers")
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="the most tokens of training answers")
    parser.add_argument("--drafted", type=int, nargs="+", default=[8, 15], help="the longest drafts")
    arguments = parser.parse_args()
    tokenizer = hf_tokenizer(arguments.model)
    train, test = (qa_dataset(tokenizer, str(arguments.data_dir / f"{name}.jsonl")) for name in ("train", "test"))
    new = unseen(train, test)
    texts = [split(test[i]) for i in islice(new, arguments.count)]
    predicted = [
        ([*predicted_tokens(test.examples[i].get("prediction"), prompt, tokenizer), *prompt], answer)
        for i, (prompt, answer) in zip(new, texts, strict=False)
    ]
    sources = [("the text", texts, 1, None), ("answers", texts, None, True), ("both", texts, 1, True)]
    if predicted != texts:
        sources += [("the text, predictions", predicted, 1, None), ("all of them", predicted, 1, True)]
    answers = answers_of(train, tokenizer, str(arguments.data_dir), arguments.tokens)
    size = 0 if answers is None else len(answers.tokens)
    mean = sum(len(answer) for _, answer in texts) / max(len(texts), 1)
    print(
        f"{len(texts)} of {len(new)} new test answers of {len(test)}, {mean:.0f} tokens on average; {size} tokens known"
    )
    print(f"{'looked up in':<22}{'at most':>9}{'tokens per round':>18}{'drafted':>9}")
    for count in arguments.drafted:
        for name, searched, least, known in sources:
            per_round, drafted = replay(searched, count, least, answers if known else None)
            print(f"{name:<22}{count:>9}{per_round:>18.2f}{drafted:>9.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Shared by tests: search."""


def search(tokens, ngram, count):
    """What followed the last earlier place with the same last `ngram` tokens, from the text's end on once more."""
    for start in range(len(tokens) - ngram - 1, -1, -1):
        if tokens[start : start + ngram] == tokens[len(tokens) - ngram :]:
            found = tokens[start + ngram :]
            return [found[i % len(found)] for i in range(count)]
    return []

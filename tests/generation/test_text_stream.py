"""The text of a growing output: stop strings at any place, and work that does not grow with the text."""

import random

import pytest

from layerskip_recipes.generation.text.text_stream import TextStream


class Bytes:
    """A tokenizer with a token for each byte. Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, tokens):
        self.decoded += len(tokens)
        return bytes(tokens).decode(errors="replace")


class Compared(str):
    """A string that counts its characters that are compared or copied."""

    count = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        Compared.count += len(part)
        return part


def shown(stream, tokens, sizes):
    """The text in the pieces in which it was shown, and the number of tokens read."""
    pieces, read = [], 0
    while read < len(tokens):
        new = tokens[read : read + next(sizes)]
        stopped = stream.extend(new)
        read += len(new) if stopped is None else stopped
        if stopped is not None:
            break
        pieces.append(stream.new_text(last=False))
    return [*pieces, stream.new_text(last=True)], read


@pytest.mark.parametrize("valid", [True, False])
def test_a_text_ends_before_the_first_stop_string_in_whatever_pieces_it_comes(valid):
    draw = random.Random(0)
    stopped = 0
    for _ in range(2000):
        if valid:
            tokens = list("".join(draw.choices("aab€b😀\N{REPLACEMENT CHARACTER}", k=12)).encode())
        else:
            tokens = draw.choices([*b"ab\x80\x82\x98\x9f\xac\xe2\xf0"], k=12)
        stops = ["".join(draw.choices("aab€", k=draw.randrange(1, 5))) for _ in range(draw.randrange(4))]
        stream = TextStream(Bytes(), stop_strings=stops)
        pieces, read = shown(stream, tokens, iter(lambda: draw.randrange(1, 5), None))
        whole = bytes(tokens[:read]).decode(errors="replace")
        end = min((whole.find(stop) for stop in stops if stop in whole), default=None)
        assert "".join(pieces) == whole[:end] == stream.text(tokens[:read]), (tokens, stops)
        before = bytes(tokens[: read - 1]).decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}")
        assert not any(stop in before for stop in stops), "the first token that completes the string is the last"
        stopped += end is not None
    assert stopped > 200


@pytest.mark.parametrize("text", ["a" * 4000, "a" * 2999 + "b" + "a" * 1000, "x" * 4000])
def test_a_token_costs_no_more_for_a_long_stop_string(text):
    """The start of this string is almost everywhere in the text, or nowhere."""
    stop = Compared("a" * 3000 + "b")
    Compared.count = 0
    stream = TextStream(Bytes(), stop_strings=[stop])
    pieces, _ = shown(stream, list(text.encode()), iter(lambda: 1, None))
    assert "".join(pieces) == text
    # The string is copied and compared with itself once. Then each character is compared about twice.
    assert Compared.count < 6 * len(stop) + 6 * len(text)


def test_only_the_text_that_may_begin_a_stop_string_is_kept():
    stream = TextStream(Bytes(), stop_strings=["aab"])
    for token in b"xa" * 1000 + b"aa":
        stream.extend([token])
        stream.new_text(last=False)
        texts = [value for value in vars(stream).values() if isinstance(value, str | list)]
        assert sum(map(len, texts)) < 10
    assert stream.new_text(last=True) == "aa"


@pytest.mark.parametrize("character", ["\N{REPLACEMENT CHARACTER}".encode(), b"\x80", b"\xf0", b"\xf0\x9f\x98\x80\xe2"])
def test_tokens_that_never_complete_a_character_are_decoded_a_few_times_each(character):
    tokenizer, tokens = Bytes(), list(character * 500)
    stream = TextStream(tokenizer, stop_strings=["never"])
    pieces, _ = shown(stream, tokens, iter(lambda: 1, None))
    assert max(map(len, pieces)) < 10  # shown as it comes
    assert tokenizer.decoded < 40 * len(tokens)
    assert "".join(pieces) == stream.text(tokens)

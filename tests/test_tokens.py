"""Tokens: the rule of CLIP, as open_clip has it, and where transformers has another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from open_clip.tokenizer import SimpleTokenizer
from peers import clip_tokenizer

from model.text_encoder import END, words_of

READ_AS = {
    "HTML": ("cats &amp; dogs", "cats & dogs"),
    "HTML twice": ("cats &amp;lt; dogs", "cats < dogs"),
    "ligatures": ("a ﬁne ﬂower", "a fine flower"),
    "curly quotes": ("it’s a “fox”", 'it\'s a "fox"'),
    "wide letters": ("ＦＯＸ", "fox"),
    "mojibake": ("schÃ¶n", "schön"),
    "escapes": ("\x1b[31mred", "red"),
}


def tokens(prompt: str) -> list[int]:
    return [token for _, pieces in words_of(prompt) for token in pieces]


@pytest.fixture(scope="module")
def peer_tokens() -> Callable[..., list[int]]:
    made = {pad: clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")}
    return lambda prompt, pad="<|endoftext|>": made[pad](prompt).input_ids[1:-1]


@pytest.mark.parity("open_clip SimpleTokenizer", 0)
@pytest.mark.parametrize("name", READ_AS)
def test_text_is_cleaned_before_it_is_cut(peer_tokens: Callable[..., list[int]], name: str) -> None:
    """ftfy and HTML first; transformers takes the letters as they are."""
    prompt, plain = READ_AS[name]
    assert tokens(prompt) == SimpleTokenizer().encode(prompt) == tokens(plain) == peer_tokens(plain)
    assert peer_tokens(prompt) != tokens(prompt)


@pytest.mark.parity("open_clip SimpleTokenizer", 0)
def test_special_tokens_in_a_prompt(peer_tokens: Callable[..., list[int]]) -> None:
    """`<|endoftext|>` is letters here; to transformers it is the end token. open_clip has another name for that token."""
    spelled = "fox <|endoftext|> owl"
    assert END not in tokens(spelled) and tokens(spelled) == SimpleTokenizer().encode(spelled)
    assert peer_tokens(spelled) == [*tokens("fox"), END, *tokens("owl")]
    assert tokens("fox <end_of_text> owl") == [*tokens("fox"), END, *tokens("owl")]


@pytest.mark.parity("transformers CLIPTokenizer", 0)
def test_an_exclamation_mark_where_it_pads(peer_tokens: Callable[..., list[int]]) -> None:
    """SD 2 pads with token 0, "!" inside a word. transformers takes every "!" of a prompt for padding."""
    assert tokens("fox!") == peer_tokens("fox!") == [*tokens("fox"), 256]
    assert peer_tokens("fox!", "!") == [*tokens("fox"), 0]

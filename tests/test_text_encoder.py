"""The text encoder against transformers' CLIPTextModel, and the tokenizer against open_clip's and known ids."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from peers import max_error, number_of, text_pair
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from checkpoints.diffusers_folder import text_settings
from model.text_encoder import END, SD15_TEXT, SD21_TEXT, START, TextConfig, TextEncoder, words_of
from train.clip import MINI_TEXT
from train.world import World

TOLERANCE = 1e-12  # measured: 2e-14 and less
WIDTH, LAYERS, HEADS, OUTPUT = 16, 3, 2, 10
CAT = [START, 320, 1125, 539, 320, 2368, END]  # "a photo of a cat"


def pair(activation: Any, **changes: Any) -> tuple[Any, TextEncoder]:
    return text_pair(TextConfig(WIDTH, LAYERS, HEADS, activation=activation, **changes))


def tokens() -> Tensor:
    return torch.tensor([[START, *[7 * i for i in range(40)], END, *[END] * 35], [*CAT, *[END] * 70]])


@pytest.mark.parity("transformers CLIPTextModel", TOLERANCE)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hidden_states_equal_transformers(activation: str) -> None:
    peer, ours = pair(activation)
    want = peer(tokens(), output_hidden_states=True)
    assert max_error(ours(tokens()), want.last_hidden_state) < TOLERANCE
    penultimate, norm = (
        want.hidden_states[-2],
        next(m for name, m in peer.named_modules() if name.endswith("final_layer_norm")),
    )
    assert max_error(ours.hidden_states(tokens(), skip=1, final_norm=False), penultimate) < TOLERANCE  # SDXL
    assert max_error(ours.hidden_states(tokens(), skip=1, final_norm=True), norm(penultimate)) < TOLERANCE  # SD 2
    assert max_error(penultimate, want.last_hidden_state) > 0.1


def test_forward_reads_what_the_config_says() -> None:
    _, ours = pair("gelu")
    for skip, final_norm in ((0, True), (1, True), (1, False), (2, False)):
        other = (
            TextEncoder(TextConfig(WIDTH, LAYERS, HEADS, activation="gelu", skip=skip, final_norm=final_norm))
            .double()
            .eval()
        )
        other.load_state_dict(ours.state_dict())
        assert max_error(other(tokens()), ours.hidden_states(tokens(), skip, final_norm)) < TOLERANCE


@pytest.mark.parity("transformers CLIPTextModelWithProjection", TOLERANCE)
@pytest.mark.parametrize("vocabulary", [(), (*range(48), START, END)], ids=["whole", "small"])
def test_pooled_equals_transformers(vocabulary: tuple[int, ...]) -> None:
    """The embedding is read at the first end token. open_clip stores the projection transposed."""
    peer, ours = pair("gelu", output_dim=OUTPUT, vocabulary=vocabulary)
    ids = torch.tensor([[48, 3, 9, 49, 49, 49], [48, 3, 9, 7, 1, 49]]) if vocabulary else tokens()
    assert max_error(ours.pooled(ids), peer(ids).text_embeds) < TOLERANCE


def test_a_shorter_prompt_gives_the_same_states() -> None:
    _, ours = pair("quick_gelu")
    whole = ours(tokens())
    for n in (1, 8, 76):
        assert max_error(ours(tokens()[:, :n]), whole[:, :n]) < TOLERANCE


def encoder(**changes: Any) -> TextEncoder:
    with torch.device("meta"):
        return TextEncoder(TextConfig(WIDTH, 1, HEADS, **changes))


PROMPTS = [
    "",
    "a photo of a cat",
    "An astronaut, riding a HORSE; 8k!!",
    "naïve café 🦊 東京",
    "it's  supercalifragilistic &amp; co.\n",
]


@pytest.mark.parity("open_clip tokenize", 0)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_open_clip(prompt: str) -> None:
    """open_clip pads with 0, as SD 2 and SDXL do; SD 1.5 repeats the end token."""
    want = open_clip.tokenize([prompt, "a cat"])
    assert torch.equal(encoder(pad=0).tokenize([prompt, "a cat"]), want)
    ended = (want == END).cumsum(dim=1) > 0
    assert torch.equal(encoder().tokenize([prompt, "a cat"]), torch.where(ended, END, want))


def test_known_ids() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder().tokenize(["a photo of a cat"]).tolist() == [CAT + [END] * 70]
    assert SD15_TEXT.pad == END and SD21_TEXT.pad == 0


def test_words_are_whole() -> None:
    assert [word for word, _ in words_of("A photo of supercalifragilistic foxes!")] == [
        "a",
        "photo",
        "of",
        "supercalifragilistic",
        "foxes",
        "!",
    ]
    assert len(words_of("supercalifragilistic")[0][1]) > 1


@pytest.mark.parity("open_clip tokenize", 0)
def test_a_long_prompt_is_cut_with_a_warning_that_names_the_words() -> None:
    prompt = "cat " * 75 + "fox teapot"
    with pytest.warns(UserWarning, match="longer than 75 tokens; these words are cut off: fox teapot$"):
        row = encoder(pad=0).tokenize([prompt])
    assert torch.equal(row, open_clip.tokenize([prompt]))
    assert row.shape == (1, 77) and row[0, -1] == END
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder().tokenize(["cat " * 75])


def test_a_small_vocabulary_leaves_out_unknown_words_and_names_them() -> None:
    """Rows are in the order of `vocabulary`. The end token, where the pooled embedding is read, is the last."""
    small = encoder(vocabulary=(320, 2368, 539, START, END))
    with pytest.warns(UserWarning, match="left out: photo, zebra$"):
        rows = small.tokenize(["a photo of a cat zebra"])
    assert rows.tolist() == [[3, 0, 2, 0, 1, 4, *[4] * 71]]
    assert small.clip.token_embedding.weight.shape == (5, WIDTH)
    known = TextEncoder(replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8))
    with pytest.warns(UserWarning, match="left out: owlish$"):  # the vocabulary has one of its two tokens, that of "owl"
        known.tokenize("an owlish fox")


@pytest.mark.parity("transformers CLIPTextModel", 0)
@pytest.mark.parametrize(
    ("config", "parameters", "keys"), [(SD15_TEXT, 123_060_480, 148), (SD21_TEXT, 352_984_064, 292)]
)
def test_official_sizes(config: TextConfig, parameters: int, keys: int) -> None:
    """The number of parameters is that of transformers. There are four tensors fewer per layer, because q, k and v are joined.

    SD 2 does not use the last layer, but the layer exists.
    """
    with torch.device("meta"):
        ours, peer = TextEncoder(config), CLIPTextModel(CLIPTextConfig(**text_settings(config)))
    assert number_of(ours) == (parameters, keys)
    assert number_of(peer) == (parameters, keys + 4 * config.layers)


def test_the_small_vocabulary_knows_every_caption_of_the_mini_world() -> None:
    encoder, world = TextEncoder(replace(MINI_TEXT, width=8, layers=1, heads=2, output_dim=8)), World("train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize(sorted({text for i in range(600) for text in (world[i].caption, world[i].rich_caption)}))

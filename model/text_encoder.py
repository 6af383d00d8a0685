"""CLIP's text encoder, built from open_clip's modules. It maps prompts to text tokens c_t.

Stable Diffusion attends to all 77 positions, including the padding, so the padding token affects the output. A model
with a reduced vocabulary has embeddings for only some of CLIP's tokens: `vocabulary[i]` is the CLIP token of row i.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

START, END = 49406, 49407  # <|startoftext|>, <|endoftext|> in CLIP's vocabulary


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder, and which hidden state the UNet reads. The default is SD 1.5 (CLIP ViT-L/14)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    output_dim: int = 0  # width of the pooled, projected embedding; 0 = no projection
    vocab_size: int = 49408
    context_length: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    pad: int = END  # padding token; 0 in SD 2 and in SDXL's OpenCLIP
    skip: int = 0  # number of final layers to skip: 1 = read the penultimate layer (SD 2); `TextEncoderPair` does so for both
    final_norm: bool = True
    vocabulary: tuple[int, ...] = ()  # CLIP tokens of a reduced vocabulary; () = the full vocabulary


SD15_TEXT = TextConfig()
SD21_TEXT = TextConfig(width=1024, layers=24, heads=16, activation="gelu", pad=0, skip=1)
SDXL_TEXT_2 = TextConfig(width=1280, layers=32, heads=20, output_dim=1280, activation="gelu", pad=0)  # OpenCLIP ViT-bigG/14


@functools.cache
def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # imported here, because it takes seconds

    return SimpleTokenizer()


def vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary: {piece of a word: token}."""
    return dict(_tokenizer().encoder)


def merges() -> list[tuple[str, str]]:
    """Return the pairs of pieces that CLIP's byte-pair encoding joins, in their order."""
    return list(_tokenizer().bpe_ranks)


def words_of(text: str) -> list[tuple[str, list[int]]]:
    """Split a prompt into words, and each word into CLIP tokens, by CLIP's rules (lower case, byte-pair encoding)."""
    tokenizer, words, pieces = _tokenizer(), [], []
    for token in tokenizer.encode(text):
        pieces.append(token)
        if tokenizer.decoder[token].endswith("</w>"):
            words.append((tokenizer.decode(pieces).strip(), pieces))
            pieces = []
    return [*words, (tokenizer.decode(pieces), pieces)] if pieces else words


class TextEncoder(nn.Module):
    """Maps a prompt to text tokens c_t, CLIP's hidden states."""

    def __init__(self, config: TextConfig = SD15_TEXT) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer  # imported here, because it takes seconds

        super().__init__()
        if config.vocabulary and config.vocabulary[-1] != END:
            raise ValueError("the last token of a reduced vocabulary must be the end token, as in CLIP's vocabulary")
        self.config = config
        self.clip = TextTransformer(
            context_length=config.context_length,
            vocab_size=len(config.vocabulary) or config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            mlp_ratio=config.mlp_ratio,
            output_dim=config.output_dim or None,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )
        self.clip.attn_mask = None  # `hidden_states` makes the mask; a non-persistent buffer would stay on the meta device
        self.rows = {token: row for row, token in enumerate(config.vocabulary)}

    @property
    def width(self) -> int:
        """The width of the text tokens."""
        return self.config.width

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Tokenize one or more prompts to `b 77`: start, words, end, padding.

        Words that are not in a reduced vocabulary are omitted, and prompts longer than 77 tokens are truncated. Both
        raise a warning that lists the words.
        """
        return self.pad(self.split(prompts))

    def split(self, prompts: str | Sequence[str]) -> list[list[int]]:
        """Split prompts into tokens: start, words, end, without padding. Warns as `tokenize` does."""
        length = self.config.context_length
        rows = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            tokens, unknown, rest = [START], [], []
            for word, pieces in words_of(prompt):
                if self.rows and not all(piece in self.rows for piece in pieces):
                    unknown.append(word)
                else:
                    if len(tokens) + len(pieces) > length - 1:
                        rest.append(word)
                    tokens += pieces
            if unknown:
                warnings.warn(
                    f"this model's vocabulary does not contain these words, so they are left out: {', '.join(unknown)}",
                    stacklevel=2,
                )
            if rest:
                warnings.warn(f"the prompt is longer than {length - 2} tokens; these words are cut off: {' '.join(rest)}", stacklevel=2)
            rows.append([*tokens[: length - 1], END])
        return rows

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Pad rows of CLIP's tokens to `b 77`, and number them as the token embedding does."""
        full = [[*row, *[self.config.pad] * (self.config.context_length - len(row))] for row in rows]
        return torch.tensor([[self.rows[token] for token in row] for row in full] if self.rows else full)

    def hidden_states(self, tokens: Tensor, skip: int = 0, final_norm: bool = True) -> Tensor:
        """Compute the hidden states `b n c` of tokens `b n`, without the last `skip` layers.

        Attention is causal, so a state does not depend on later tokens.
        """
        n = tokens.shape[1]
        x: Tensor = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:n]
        mask = torch.full((n, n), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in self.clip.transformer.resblocks[: self.config.layers - skip]:
            x = block(x, attn_mask=mask)
        return self.clip.ln_final(x) if final_norm else x

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the text tokens c_t, `b 77 c`, of tokens `b 77`: the hidden states that the UNet reads."""
        return self.hidden_states(tokens, self.config.skip, self.config.final_norm)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Compute CLIP's text embedding, `b e`: the projected hidden state of the first end token, not normalised."""
        x = self.hidden_states(tokens)
        end = len(self.config.vocabulary) - 1 if self.rows else END
        at = x[torch.arange(len(x), device=x.device), (tokens == end).int().argmax(dim=-1)]
        projection: Tensor = self.clip.text_projection
        return at @ projection


class TextEncoderPair(nn.Module):
    """SDXL's two text encoders: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, which split prompts alike but pad differently."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def width(self) -> int:
        """The width of the text tokens."""
        return self.first.config.width + self.second.config.width

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Tokenize one or more prompts for both encoders, `b 2 77`, as `TextEncoder.tokenize` does."""
        rows = self.first.split(prompts)
        return torch.stack([self.first.pad(rows), self.second.pad(rows)], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the text tokens c_t, `b 77 c`: the penultimate hidden states of both encoders, side by side, not normalised."""
        pairs = zip((self.first, self.second), tokens.unbind(dim=1), strict=True)
        return torch.cat([encoder.hidden_states(one, skip=1, final_norm=False) for encoder, one in pairs], dim=-1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Compute the text embedding of the second encoder, `b e`, from tokens `b 2 77`."""
        return self.second.pooled(tokens[:, 1])


Text = TextEncoder | TextEncoderPair

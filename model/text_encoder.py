"""CLIP's text tower, on open_clip's modules: prompts to the text tokens c_t.

Stable Diffusion attends to all 77 positions, padding included, so the padding token is part of the model. A small
vocabulary keeps only some of CLIP's tokens: `vocabulary[i]` is the CLIP token of embedding row i.
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
    """Sizes of the tower and which hidden state the UNet reads; the default is SD 1.5 (CLIP ViT-L/14)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    output_dim: int = 0  # width of the projected, pooled embedding; 0 = none stored
    vocab_size: int = 49408
    context_length: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    pad: int = END  # SD 2 and SDXL's OpenCLIP pad with 0
    skip: int = 0  # last layers left out: 1 = penultimate (SD 2, SDXL)
    final_norm: bool = True
    vocabulary: tuple[int, ...] = ()


SD15_TEXT = TextConfig()
SD21_TEXT = TextConfig(width=1024, layers=24, heads=16, activation="gelu", pad=0, skip=1)


@functools.cache
def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds to import, so only where it is needed

    return SimpleTokenizer()


def vocabulary() -> dict[str, int]:
    """CLIP's vocabulary: each piece of a word and its token."""
    return dict(_tokenizer().encoder)


def words_of(text: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt and their CLIP tokens, by CLIP's own rule (lower case, byte-pair encoding)."""
    tokenizer, words, pieces = _tokenizer(), [], []
    for token in tokenizer.encode(text):
        pieces.append(token)
        if tokenizer.decoder[token].endswith("</w>"):
            words.append((tokenizer.decode(pieces).strip(), pieces))
            pieces = []
    return [*words, (tokenizer.decode(pieces), pieces)] if pieces else words


class TextEncoder(nn.Module):
    """c_t = CLIP's hidden states of a prompt."""

    def __init__(self, config: TextConfig = SD15_TEXT) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer  # as above

        super().__init__()
        if config.vocabulary and config.vocabulary[-1] != END:
            raise ValueError("the last token of a small vocabulary must be the end token, as it is in CLIP's")
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
        self.clip.attn_mask = None  # a non-persistent buffer would stay on the meta device; `hidden` builds its own
        self.rows = {token: row for row, token in enumerate(config.vocabulary)}

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """One prompt or several to tokens, `b 77`: start, the words, end, padding.

        Warns, naming them, of words that the small vocabulary does not know (left out) and of words cut off at 77 tokens.
        """
        length = self.config.context_length
        rows = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            tokens, unknown, cut = [START], [], []
            for word, pieces in words_of(prompt):
                if self.rows and not all(piece in self.rows for piece in pieces):
                    unknown.append(word)
                else:
                    if len(tokens) + len(pieces) > length - 1:
                        cut.append(word)
                    tokens += pieces
            if unknown:
                warnings.warn(
                    f"these words are not in this model's vocabulary and are left out: {', '.join(unknown)}",
                    stacklevel=2,
                )
            if cut:
                warnings.warn(f"the prompt is longer than {length - 2} tokens; cut off: {' '.join(cut)}", stacklevel=2)
            tokens = [*tokens[: length - 1], END]
            rows.append(tokens + [self.config.pad] * (length - len(tokens)))
        if self.rows:
            rows = [[self.rows[token] for token in row] for row in rows]
        return torch.tensor(rows)

    def hidden(self, tokens: Tensor, skip: int = 0, final_norm: bool = True) -> Tensor:
        """Hidden states `b n c` for tokens `b n`, without the last `skip` layers. Causal: a shorter n gives the same states."""
        n = tokens.shape[1]
        x = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:n]
        mask = torch.full((n, n), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in self.clip.transformer.resblocks[: self.config.layers - skip]:
            x = block(x, attn_mask=mask)
        return self.clip.ln_final(x) if final_norm else x

    def forward(self, tokens: Tensor) -> Tensor:
        """Text tokens c_t, `b 77 c`: the layer and norm that this base model reads."""
        return self.hidden(tokens, self.config.skip, self.config.final_norm)

    def pooled(self, tokens: Tensor) -> Tensor:
        """CLIP's projected text embedding `b e`, read at the end token; not normalised."""
        x = self.hidden(tokens)
        end = len(self.config.vocabulary) - 1 if self.rows else END
        at = x[torch.arange(len(x)), (tokens == end).int().argmax(dim=-1)]
        return at @ self.clip.text_projection

"""The forms of image attention that the ablation compares.

The paper's simple adapter (section 4.4.1, Figure 10) differs from IP-Adapter in two ways: the text's projections read the image
tokens, and text and image share one softmax. The four combinations, and the simple adapter with as many parameters as
IP-Adapter, take the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.attention import Fuse, concatenated, decoupled


@dataclass(frozen=True)
class Form:
    """One form of image attention.

    `own`: train W'_k and W'_v, or use the text's W_k and W_v. `fuse`: a softmax for each source, or a joint one. `lambdas`: the
    weights to draw with; `few` of them after parts of the training. `wide`: use so many tokens that the projection has as many
    parameters as W'_k and W'_v would add.
    """

    name: str
    own: bool
    fuse: Fuse
    lambdas: tuple[float, ...]
    few: tuple[float, ...]
    wide: bool = False

    def lambdas_of(self, task: str) -> tuple[float, ...]:
        """The weights to draw a task with."""
        return self.lambdas if task == "conflict" else (1.0,)


SUM = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 1.0)  # decoupled: lambda scales what the image attention returns
ODDS = (1 / 4096, 1 / 512, 1 / 64, 1 / 8, 1.0, 8.0, 64.0), (1 / 8, 8.0)  # concatenated: lambda scales exp(logit)
FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, own softmax", True, decoupled, *SUM),
    "shared": Form("the text's projections, own softmax", False, decoupled, *SUM),
    "concatenated": Form("own projections, joint softmax", True, concatenated, *ODDS),
    "simple": Form("the simple adapter: the text's projections, joint softmax", False, concatenated, *ODDS),
    "simple_wide": Form("the simple adapter with as many parameters", False, concatenated, *ODDS, wide=True),
}
BASELINE, PRIMARY = "ip_adapter", "simple"  # the paper's comparison; PRIMARY minus BASELINE is the primary difference
SHARES = (0.25, 0.5, 1.0)  # of the training, after which an adapter is evaluated

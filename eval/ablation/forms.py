"""The forms of image attention that the ablation compares.

The paper's simple adapter (section 4.4.1, Figure 10) differs from IP-Adapter in two ways: image tokens go through the text's projections,
and text and image share one softmax. The ablation separates the two effects with all four combinations. A fifth form is the simple
adapter with as many parameters as IP-Adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.attention import Fuse, concatenated, decoupled


@dataclass(frozen=True)
class Form:
    """One form of image attention.

    `own_projections`: train W'_k and W'_v, instead of using the text's W_k and W_v. `fuse`: separate softmaxes or a joint one.
    `lambdas`: the values of lambda to draw with after training. `few`: those to draw with after parts of the training. `wide`: add
    image tokens, so that the larger projection has as many additional parameters as W'_k and W'_v.
    """

    name: str
    own_projections: bool
    fuse: Fuse
    lambdas: tuple[float, ...]
    few: tuple[float, ...]
    wide: bool = False

    def lambdas_of(self, task: str) -> tuple[float, ...]:
        """Return the values of lambda to draw a task with."""
        return self.lambdas if task == "conflict" else (1.0,)


SUM = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 1.0)  # decoupled: lambda scales the output of the image attention
ODDS = (1 / 4096, 1 / 512, 1 / 64, 1 / 8, 1.0, 8.0, 64.0), (1 / 8, 8.0)  # concatenated: lambda scales exp(logit)
FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, own softmax", True, decoupled, *SUM),
    "shared": Form("the text's projections, own softmax", False, decoupled, *SUM),
    "concatenated": Form("own projections, joint softmax", True, concatenated, *ODDS),
    "simple": Form("the simple adapter: the text's projections, joint softmax", False, concatenated, *ODDS),
    "simple_wide": Form("the simple adapter with as many parameters", False, concatenated, *ODDS, wide=True),
}
BASELINE, PRIMARY = "ip_adapter", "simple"  # the primary difference is PRIMARY minus BASELINE, the paper's comparison
SHARES = (0.25, 0.5, 1.0)  # shares of the training after which an adapter is evaluated

"""The forms of image attention that the ablation compares.

The paper's simple adapter (section 4.4.1, Figure 10) differs from IP-Adapter in two ways: image tokens go through the text's projections,
and text and image share one softmax. Tier A separates the two effects with all four combinations. Tier B asks what a joint softmax does:
does the text lose, or the image (eval/ablation/fuses.py)?
"""

from __future__ import annotations

from dataclasses import dataclass

from eval.ablation.fuses import even_odds, image_yields, mixed, text_yields, unpadded
from eval.ablation.grid import Scale
from model.attention import Fuse, concatenated, decoupled


@dataclass(frozen=True)
class Form:
    """One form of image attention.

    `short`: a name for narrow columns. `own_projections`: train W'_k and W'_v, instead of using the text's W_k and W_v. `fuse`: separate
    softmaxes or a joint one. `scale`: what lambda multiplies. `tokens`: image tokens. `zero_values`: W'_v starts at zero instead of W_v.
    `padding`: whether attention reads the padding of the text.
    """

    name: str
    short: str
    own_projections: bool
    fuse: Fuse
    scale: Scale
    tokens: int = 4
    zero_values: bool = False
    padding: bool = True


FORMS = {
    "ip_adapter": Form("IP-Adapter: own projections, separate softmax", "IP-Adapter", True, decoupled, "sum"),
    "simple": Form("the simple adapter: the text's projections, joint softmax", "simple", False, concatenated, "odds"),
    "shared": Form("the text's projections, separate softmax", "shared", False, decoupled, "sum"),
    "concatenated": Form("own projections, joint softmax", "concatenated", True, concatenated, "odds"),
    "image_yields": Form("own projections, the text weakens the image", "image yields", True, image_yields, "sum"),
    "text_yields": Form("own projections, the image weakens the text", "text yields", True, text_yields, "sum"),
    "mixed": Form("own projections, a learned mixture", "mixed", True, mixed, "none"),
    "shared_image_yields": Form("the text's projections, the text weakens the image", "image yields, shared", False, image_yields, "sum"),
    "shared_text_yields": Form("the text's projections, the image weakens the text", "text yields, shared", False, text_yields, "sum"),
    "tokens_1": Form("IP-Adapter, 1 token", "1 token", True, decoupled, "sum", tokens=1),
    "tokens_16": Form("IP-Adapter, 16 tokens", "16 tokens", True, decoupled, "sum", tokens=16),
    "tokens_64": Form("IP-Adapter, 64 tokens", "64 tokens", True, decoupled, "sum", tokens=64),
    "zero_values": Form("IP-Adapter, W'_v starts at zero", "zero W'_v", True, decoupled, "sum", zero_values=True),
    "joint_unpadded": Form("own projections, joint softmax, no padding", "joint, no padding", True, unpadded, "odds", padding=False),
    "simple_unpadded": Form("the simple adapter, no padding", "simple, no padding", False, unpadded, "odds", padding=False),
    "joint_even": Form("own projections, joint softmax, even odds", "joint, even", True, even_odds, "odds"),
    "simple_even": Form("the simple adapter, even odds", "simple, even", False, even_odds, "odds"),
}
TIER_A = "ip_adapter", "simple", "shared", "concatenated"
OWN = "ip_adapter", "concatenated", "image_yields", "text_yields", "mixed"
SHARED = "shared", "simple", "shared_image_yields", "shared_text_yields"
# tier D -> the form that it varies
VARIANTS = {
    **dict.fromkeys(("tokens_1", "tokens_16", "tokens_64", "zero_values"), "ip_adapter"),
    **dict.fromkeys(("joint_unpadded", "joint_even"), "concatenated"),
    **dict.fromkeys(("simple_unpadded", "simple_even"), "simple"),
}
IP_ADAPTER, SIMPLE = "ip_adapter", "simple"  # the primary difference is IP_ADAPTER minus SIMPLE, the paper's comparison


def fraction(lam: float) -> str:
    """Format a lambda: 0.25, 1/512."""
    return f"1/{1 / lam:.4g}" if 0 < lam < 0.1 else f"{lam:.3g}"

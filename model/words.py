"""Words that settings take. Nothing here imports torch, so that a command can read its arguments at once."""

from typing import Literal

Fit = Literal["crop", "squash", "pad"]  # how a picture is made square
Prediction = Literal["epsilon", "v"]  # what a UNet predicts

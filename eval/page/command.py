"""`python -m eval page`: open a page to play with image prompts, lambda and attention in the browser."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from pathlib import Path

from sampling.request import WEIGHTS, Model


def run(args: Namespace) -> None:
    """Serve the page until Ctrl-C. Uploads and drawings lie in a temporary folder, which is removed at the end."""
    adapters, controls = ((one,) if one else () for one in (args.ip_adapter, args.control))
    model = Model(args.checkpoint or WEIGHTS, adapters, args.image_encoder, dtype=args.dtype, controls=controls)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        try:
            from eval.page.tabs import serve  # imports Gradio, which reads these variables
        except ModuleNotFoundError as error:
            raise FileNotFoundError(f"{error.name} is not installed: `make page` installs what the page needs") from None
        serve(model, args.device, args.port, Path(folder))

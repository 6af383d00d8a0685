"""Opens a page to play with: image prompts, lambda and attention in the browser.

python -m page
python -m page --checkpoint sd15.safetensors --ip-adapter ip-adapter_sd15.safetensors --image-encoder models/image_encoder

Only this computer can open it. To show it elsewhere, forward its port: ssh -L 7860:localhost:7860 THIS-COMPUTER
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sampling.__main__ import printable
from sampling.request import Model


def main() -> None:
    p = argparse.ArgumentParser("python -m page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, default=Model.checkpoint, help="base model (default: the mini weights)")
    p.add_argument("--ip-adapter", type=Path, help="adapter (default: the one in the checkpoint's folder)")
    p.add_argument("--image-encoder", type=Path, help="image encoder (default: the one in the checkpoint's folder)")
    p.add_argument("--control", type=Path, help="ControlNet or T2I-Adapter")
    p.add_argument("--device", default="cpu", help="device, such as cuda (default: cpu)")
    p.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    args = p.parse_args()
    adapters, controls = ([one] if one else [] for one in (args.ip_adapter, args.control))
    model = Model(args.checkpoint, tuple(adapters), args.image_encoder, controls=tuple(controls))
    with tempfile.TemporaryDirectory() as folder:  # everything that is uploaded or drawn; removed at the end
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        try:
            from page.tabs import open_page

            open_page(model, args.device, args.port, Path(folder))
        except ModuleNotFoundError as error:
            sys.exit(f"error: {error.name} is not installed: `make page` installs what the page needs")
        except (ValueError, OSError) as error:
            sys.exit(f"error: {printable(error)}")


if __name__ == "__main__":
    main()

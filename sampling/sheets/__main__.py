"""Draw labelled sheets of pictures with the mini weights.

python -m sampling.sheets demo --seed 0 --out out/demo.png
python -m sampling.sheets gallery --seed 0 --out out/gallery
python -m sampling.sheets figures --seed 0 --out out/figures
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sampling.sheets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about, out in (
        ("demo", "Draw the contact sheet: image prompts alone, with a text, and at increasing lambda.", "out/demo.png"),
        ("gallery", "Draw a sheet for each way to control a drawing.", "out/gallery"),
        ("figures", "Draw the paper's Figures 1, 4, 5, 7, 8 and 11.", "out/figures"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--seed", type=int, default=0, help="Seed of the first picture. Default 0.")
        command.add_argument("--out", type=Path, default=Path(out), help=f"File or folder to write. Default {out}.")
    args = parser.parse_args(argv)
    began = time.time()
    from sampling.sheets import (  # imported after the arguments are parsed, because torch takes seconds
        demo,
        figures,
        gallery,
    )

    try:
        output = {"demo": demo, "gallery": gallery, "figures": figures}[args.command].write(args.seed, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print(f"{output}, drawn in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()

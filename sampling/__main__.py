"""Draw pictures from an image prompt, a text prompt, or both.

python -m sampling --image cat.png --prompt "on a pink background" --scale 0.7 --seed 0 --out out.png
python -m sampling --ip-adapter a.bin --image x.png --scale 0.5 --ip-adapter b.bin --image y.png --scale 0.8
python -m sampling --init-image photo.png --mask mask.png --prompt "a red hat" --out out.png
python -m sampling --control canny.safetensors --hint edges.png --control-scale 0.8 --control-end 0.8 --image cat.png
python -m sampling --again out.png --out same.png
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from sampling.options import parse


def run(argv: Sequence[str] | None = None) -> None:
    command = parse(argv, __doc__)
    from sampling.command import run  # imported after the arguments are parsed, because torch takes seconds

    run(command)


def printable(text: object) -> str:
    """Escape control characters, which may come from a file's name or contents."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def main() -> None:
    warnings.showwarning = lambda message, *_: print(f"warning: {printable(message)}", file=sys.stderr)
    try:
        run()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")


if __name__ == "__main__":
    main()

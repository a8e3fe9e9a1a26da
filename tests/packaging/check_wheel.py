"""Builds the distributions, and tries the wheel in an environment of its own, with the demo and with each extra alone.

    make packages

It takes minutes and is not part of `make test`. What the extras need beyond the base is installed into environments
that see the base through a path file, so that torch is installed once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVELOPMENT = {"bench", "browser", "dev", "docs", "notebooks"}
"""Extras for work on this package, which the Makefile installs."""
REQUIRE = """
import sys
from hyperadapters.utils.optional import _EXTRA_OF, require
for module in [module for module, extra in _EXTRA_OF.items() if extra == sys.argv[1]]:
    require(module)
"""


def run(*command: object) -> str:
    """Run a command, and end with its output if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def environment(folder: Path, base: Path | None = None) -> Path:
    """Make an environment that sees the packages of the base, and return its interpreter."""
    run(sys.executable, "-m", "venv", folder)
    if base is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "base.pth").write_text(f"{next(base.glob('lib/python*/site-packages'))}\n")
    return folder / "bin" / "python"


def install(python: Path, *requirements: object) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *requirements)


def main() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        base = environment(folder / "base")
        install(base, wheel)
        command = folder / "base" / "bin" / "hyperadapters"
        print(f"{wheel.name}: {run(command, '--version').strip()}")
        run(base, "-c", "import importlib.resources as r; assert (r.files('hyperadapters') / 'py.typed').is_file()")
        for extra in sorted(extras.keys() - DEVELOPMENT - {"runtime"}):
            python = environment(folder / extra, folder / "base")
            install(python, f"{wheel}[{extra}]")
            run(python, "-c", REQUIRE, extra)
            print(f"{extra}: installed and imported", flush=True)
        python = environment(folder / "runtime")
        install(python, "--no-deps", wheel)
        install(python, *extras["runtime"])
        run(python, "-c", "import sys, hyperadapters.runtime; assert 'torch' not in sys.modules")
        print("runtime: imported without torch", flush=True)
        run(folder / "demo" / "bin" / "python", "-m", "hyperadapters", "demo", "--output", folder / "run")
        print("demo: trained and evaluated")


if __name__ == "__main__":
    main()

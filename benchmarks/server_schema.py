"""Requests that are made from the OpenAPI description of the server: no failure of the server, no breach of the schema.

    python benchmarks/server_schema.py SCHEMATHESIS [--run runs/demo] [--examples 600] [--output PATH]

SCHEMATHESIS is the command of the package schemathesis, which `make fuzz-server` installs in an environment of its own.
The tasks of a copy of the run are changed by the requests. Writes a row to benchmarks/results/serving.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
CONFIGURATION = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "4xx", 503, 504]\n'
"""A request may have a deadline of a millisecond, which is missed with status 504."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemathesis", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(arguments.run, folder / "run")
        (folder / "schemathesis.toml").write_text(CONFIGURATION)
        command = [sys.executable, "-m", "hyperadapters.cli", "serve", str(folder / "run"), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            options = ["--phases", "examples,coverage,fuzzing", "--max-examples", str(arguments.examples)]
            options += ["--request-timeout", "90", "--checks", ",".join(CHECKS)]
            found = subprocess.run(
                [str(arguments.schemathesis.absolute()), "run", f"{address}/openapi.json", *options],
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
            )
            server.terminate()
    print(found.stdout)
    cases = re.search(r"(\d+) generated(?:, (\d+) found)?", found.stdout)
    assert cases is not None
    errors = re.search(r"(\d+) errored", found.stdout)
    row = {
        "figure": "requests_from_the_schema",
        "cases": int(cases[1]),
        "failures": int(cases[2] or 0),
        "requests_without_a_response": int(errors[1]) if errors else 0,
    }
    with arguments.output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    sys.exit(found.returncode)


if __name__ == "__main__":
    main()

"""Figures and tables of the benchmark of sample efficiency, from its result rows.

    python benchmarks/efficiency_figures.py [--results FOLDER] [--docs FOLDER]

Draws docs/images/sample_efficiency.svg, ablations.svg and parameters.svg, and replaces what stands between the markers
of docs/sample-efficiency.md and README.md. Needs the extra `plot`.
"""

from efficiency.figures import main

if __name__ == "__main__":
    main()

"""Names the packages that are missing, or runs the checks and measurements."""

import sys

from studies.benchmarks.gpu.wheels import advice, core_packages, missing


def main() -> None:
    """Run the command line."""
    lacking = missing(core_packages())
    if lacking:
        print(advice(lacking), file=sys.stderr)
        sys.exit(2)
    # Only now: these import what may be missing.
    from studies.benchmarks.gpu.suite import Gpu, run
    from studies.commands import run_command

    run_command(run, Gpu)


if __name__ == "__main__":
    main()

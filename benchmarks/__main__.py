"""All measurements one after the other: ``python -m benchmarks [--quick] [--json]``."""

import argparse
import sys

from benchmarks import gates, resnet, saved


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few configurations and repetitions")
    parser.add_argument(
        "--json", action="store_true", help="write to benchmarks/results, unless --quick"
    )
    options = parser.parse_args(arguments)
    # A few configurations are no result to keep in place of a full run of the same day.
    json = ["--json"] if options.json and not options.quick else []
    quick = ["--quick"] if options.quick else []
    statuses = [gates.main(json + quick), resnet.main(json + quick), saved.main(json)]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m cbam_fused COMMAND`."""

import argparse
import sys

from cbam_fused import explanation, info

# name: a module with add_arguments(parser) and run(arguments) -> exit status, and what it does
COMMANDS = {
    "info": (info, "versions, usable backends, how the library was built, CPU features"),
    "explain": (explanation, "what the CUDA kernels would do for x of a shape, on a GPU of a name"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cbam_fused")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())

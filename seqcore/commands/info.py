"""``seqcore info``"""

import argparse
import json

from .. import info

HELP = "versions, device, and what each backend can do here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    gathered = info.gather()
    print(json.dumps(gathered, indent=2) if options.json else info.render(gathered))
    return 0

"""Kills, interrupts and fails the program at every call that touches a file: ``python tests/faults --help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent))

from fault_calls import ACTIONS, Calls, compiler, preloaded_environment


def main() -> int:
    """Run what the arguments ask for; 1 if something was lost."""
    if compiler() is None:
        print("tests/faults needs Linux and a C compiler (cc)", file=sys.stderr)
        return 2
    if not os.environ.get("LD_PRELOAD", "").endswith(".so") or "simmp-fast-faults" not in os.environ["LD_PRELOAD"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], preloaded_environment())

    import torch
    from fault_report import table, write_document
    from fault_scenarios import PLANTED, SCENARIOS

    known = {**SCENARIOS, **PLANTED}
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--scenario", nargs="+", choices=known, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument(
        "--action", nargs="+", choices=ACTIONS, help="; ".join(f"{k}: {v.meaning}" for k, v in ACTIONS.items())
    )
    parser.add_argument("--stride", type=int, default=1, help="take every n-th call")
    parser.add_argument("--short", action="store_true", help="the actions and strides of the tests")
    parser.add_argument("--calls", action="store_true", help="only list the calls that change something")
    parser.add_argument("--json", type=Path, help="a file for the results; docs/reliability.md is then left alone")
    parser.add_argument("--list", action="store_true", help="only list the scenarios")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {kind.__doc__}" for name, kind in SCENARIOS.items()))
        return 0
    torch.set_num_threads(1)
    results = []
    for name in arguments.scenario:
        results += _run(known[name](), arguments)
    if arguments.calls:
        return 0
    print(table(results))
    lost = [line for result in results for line in result.losses]
    print("\n".join([f"lost: {len(lost)}", *lost]))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(result) for result in results]))
    elif not arguments.short:
        write_document(results)
    return 1 if lost else 0


def _run(scenario, arguments: argparse.Namespace) -> list:
    from fault_harness import harness

    actions = arguments.action or (scenario.short if arguments.short else scenario.actions)
    stride = scenario.stride if arguments.short else arguments.stride
    results = []
    with harness(scenario, Calls()) as made:
        if arguments.calls:
            print("\n".join(made.record(ACTIONS["kill"])))
            return []
        for action in actions:
            if action not in scenario.actions:
                continue
            begin = time.monotonic()
            results.append(made.run(action, stride=stride, show=lambda line: print(line, flush=True)))
            print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())

"""``defgan-fast evaluate``: what is left of a defended classifier under a threat, and reasons to doubt it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from defgan_fast import evaluation, files, pictures
from defgan_fast.commands import _inputs, _threats, options
from defgan_fast.evaluation import report
from defgan_fast.evaluation.named_attacks import NAMES

CURVE_ATTACK = "apgd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``evaluate``."""
    _inputs.add_data(parser, 50)
    _inputs.add_projector(parser)
    _threats.add_threat(parser)
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: by the norm)",
    )
    parser.add_argument(
        "--epsilons",
        nargs="+",
        type=float,
        metavar="E",
        help=f"plot accuracy under {CURVE_ATTACK} against these budgets, too",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out") / "evaluate",
        help="folder of the report, which an interrupted call goes on in (default: out/evaluate)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates; a second call with the same options takes what the first one left."""
    options.check_writable(args.out)
    found = _inputs.images_of(args)
    labels = found.needed_labels()
    classifier = _inputs.network("classifier", args.model, args.dataset).to(found.images.device)
    arguments = _threats.common(args, found)
    of_curve = {name: each for name, each in arguments["settings"].items() if name == CURVE_ATTACK}
    if args.epsilons and args.attacks and CURVE_ATTACK not in args.attacks:
        arguments["settings"].pop(CURVE_ATTACK, None)
    result = evaluation.evaluate(classifier, found.images, labels, attacks=args.attacks, **arguments)
    text = result.markdown()
    made = ["report.json", "report.md", "attacked.png"]
    picture = report.picture(result, classifier, arguments["defence"])
    pictures.save_png(picture, args.out / "attacked.png")
    if args.epsilons:
        # A folder of its own, so that its reports do not take the place of the first one.
        arguments |= {"attacks": (CURVE_ATTACK,), "settings": of_curve, "folder": args.out / "epsilons"}
        curve = evaluation.accuracy_curve(classifier, found.images, labels, args.epsilons, **arguments)
        files.write_json(args.out / "epsilons.json", [point.as_dict() for point in curve])
        made.append("epsilons.json")
        for point in curve:
            text += f"\nepsilon {point.threat.epsilon:g}: {point.minimum:.3f} under {CURVE_ATTACK}"
            text += "".join(f"\n- {name}: {sentence}." for name, sentence in point.warnings.items())
        text += "\n"
        try:
            report.plot(curve, args.out / "epsilons.png")
            made.append("epsilons.png")
        except RuntimeError as error:
            print(f"no plot: {error}", file=sys.stderr)
    files.write_atomically(args.out / "report.md", text.encode())
    print(text)
    print("\n".join(str(args.out / name) for name in made))
    return 0

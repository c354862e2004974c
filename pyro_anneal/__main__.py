"""``python -m pyro_anneal``: the demo on embedded data."""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor

from . import __version__
from .demo import DemoOutcome, plot_demo, run_demo
from .results import AnnealingWarning


def _mean(values: Tensor) -> str:
    error = values.double().std() / len(values) ** 0.5
    return f"{values.double().mean():9.3f} +- {error:.3f}"


def format_outcome(outcome: DemoOutcome) -> str:
    """Formats what the demo measured as a table in nats per digit."""
    sandwich, information = outcome.sandwich, outcome.information
    rows = [
        ("log p(x), SIMULATED digits (means over digits, +- over digits)", ""),
        ("  lower bound (IM-AIS)", _mean(sandwich.lower)),
        ("  upper bound (CR-AIS)", _mean(sandwich.upper)),
        ("  gap", _mean(sandwich.gap)),
        *(
            (f"  gap from the prior instead of the encoder, T = {steps}", _mean(other.gap))
            for steps, other in outcome.from_prior.items()
        ),
        ("log p(x), held-out real digits", ""),
        ("  lower bound, encoder alone (IWAE)", _mean(outcome.held_out_guide)),
        ("  lower bound (IM-AIS)", _mean(outcome.held_out.lower)),
        ("mutual information I(x; z)", ""),
        ("  lower bound", f"{information.lower:9.3f} +- {information.lower_std_error:.3f}"),
        ("  upper bound", f"{information.upper:9.3f} +- {information.upper_std_error:.3f}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    title = (
        f"A VAE of 8 x 8 digits, trained with TVO for {len(outcome.losses)} epochs; "
        f"{sandwich.forward.num_chains} chains, {sandwich.forward.num_steps} steps; nats per digit"
    )
    lines = [title, "-" * len(title)]
    lines += [f"{name:{width}s}{value}".rstrip() for name, value in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the demo, prints its table and writes its picture."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_anneal",
        description="Train a small VAE on scikit-learn's digits with the thermodynamic variational "
        "objective, sandwich its log evidence, bound its mutual information.",
    )
    parser.add_argument(
        "--output", default="demo.png", help="picture to write (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=120, help="training epochs (default: 120)")
    parser.add_argument(
        "--num-steps", type=int, default=500, help="annealing steps T (default: 500)"
    )
    parser.add_argument("--num-data", type=int, default=100, help="digits to bound (default: 100)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--version", action="version", version=f"pyro_anneal {__version__}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices this small only lose by threads that wait for each other
    with warnings.catch_warnings():
        # The short runs of the picture are meant to be poor; the table's run speaks below.
        warnings.simplefilter("ignore", AnnealingWarning)
        outcome = run_demo(
            epochs=options.epochs,
            num_steps=options.num_steps,
            num_data=options.num_data,
            progress_bar=not options.quiet,
        )
    print(format_outcome(outcome))
    for found in (*outcome.sandwich.diagnostics, *outcome.held_out.diagnostics):
        print(f"note: {found.message}")
    plot_demo(outcome).savefig(options.output, dpi=150)
    print(f"wrote {options.output} after {outcome.seconds:.0f} s")


if __name__ == "__main__":
    main()

"""One result of each class, with all of its fields filled, for tests of what all have in common."""

import dataclasses
import math

import torch
from perfect_chains import make_run, make_sandwich, simulate

from pyro_anneal.oed import ExpectedInformationGain
from pyro_anneal.results import (
    Diagnostic,
    EvidenceFromSamples,
    EvidenceOfBatches,
    InferenceCheck,
    MutualInformation,
    Provenance,
    Result,
    compare,
)

S = [1.8, 0.6]
FOUND = Diagnostic(name="lag", severity="warning", message="far behind", value=math.inf)
PROVENANCE = Provenance(
    task="run",
    seed=3,
    kernel="HMC()",
    settings={"num_chains": "16", "guide": "auto"},
    seconds={"fit": 0.1, "total": 0.1 + 0.2},
    gradients={"chains": 7},
)


def example_results():
    """Returns results by a name of what they are."""
    problem, z = simulate(S, (3,))
    odd = {  # dtypes that NumPy has and has not, sizes of zero, site names with all signs
        "half/site 'a'": torch.randn(4, 3).to(torch.bfloat16),
        "": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex128),
        "none": torch.zeros(0, 3, dtype=torch.int8),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    record = {"diagnostics": (FOUND,), "provenance": PROVENANCE}
    run = make_run(problem, observed=odd, **record)
    weights = run.log_weights.clone()
    weights[0, 0] = -math.inf
    sandwich, _ = make_sandwich(S, (2, 3))
    information = MutualInformation.from_sandwich(sandwich)
    exact = make_run(problem, start=z, certified=True, independent_starts=True, observed=odd)
    results = {
        "run": run,
        "run with a dead chain": dataclasses.replace(
            run, log_weights=weights, pilot=None, seed=None
        ),
        "estimate": make_run(problem, start=z, certified=False),
        "reverse run": exact,
        "sandwich": sandwich,
        "batches": _batches(),
        "information": dataclasses.replace(
            information, measurements={"x": torch.tensor(2.0)}, ceiling=math.log(3)
        ),
        "comparison": compare({"a": run, "b": run}, prior_odds=[1, 3]),
        "comparison of pairs": compare([("a", (run, exact)), ("b", run)]),
        "draws": _from_draws(run, None),
        "exact draws": _from_draws(run, exact),
        "audit of draws": _audit(False),
        "audit of a guide": _audit(True),
    }
    if issubclass(ExpectedInformationGain, Result):
        pairs = torch.randn(30, 2) + 2.0
        gain = ExpectedInformationGain(pair_lower=pairs, pair_upper=pairs + 0.1, **record)
        results["gain"] = gain
    return results


def _batches():
    return EvidenceOfBatches(
        lower=torch.randn(5) - 4.0,
        single=torch.randn(5) - 5.0,
        std_error=torch.rand(5),
        ess=1.0 + torch.rand(5),
        batch_sizes=(3, 2),
        num_chains=4,
        num_steps=5,
        num_gradients=9,
        seconds=0.3,
        seed=1,
        notes=("a note",),
        data_digest="5:0",
        block_totals=torch.tensor([-20.0, -20.5]),
        provenance=PROVENANCE,
    )


def _from_draws(forward, reverse):
    size = forward.batch_shape
    return EvidenceFromSamples(
        forward=forward,
        reverse=reverse,
        bridge=forward.lower + 0.01,
        bridge_std_error=torch.full(size, 0.02),
        harmonic_mean=forward.lower - 0.02,
        harmonic_mean_std_error=torch.full(size, 0.05),
        pareto_k=torch.full((2, *size), 0.1),
        r_hat=torch.full(size, 1.01),
        num_effective=torch.full(size, 400.0),
        num_draws=1000,
        base="a Gaussian",
        exact=reverse is not None,
        diagnostics=(FOUND,),
        provenance=PROVENANCE,
    )


def _audit(is_guide):
    ranks = {"z": torch.randint(0, 20, (12, 2)), "log joint": torch.randint(0, 20, (12,))}
    return InferenceCheck(
        ranks=ranks,
        num_ranked=torch.full((12,), 19),
        uniforms={name: (rank + 0.5) / 20.0 for name, rank in ranks.items()},
        p_values={
            "z": torch.tensor([0.3, 0.9]).double(),
            "log joint": torch.tensor(0.02).double(),
        },
        lower_terms=torch.rand(12).double() if is_guide else torch.zeros(0).double(),
        upper_terms=1.0 + torch.rand(12).double(),
        rank_limit=0.01,
        is_guide=is_guide,
        diagnostics=(FOUND,),
        provenance=PROVENANCE,
    )

"""How long a plan takes, and how its ranges compare with boots that were measured.

    python benchmarks/planner.py [--json]

Time: placement, estimate with the changes that would fit, binding and the comparison of layouts, without the database,
in milliseconds of processor time, best of five; aims: 5 for one profile, 200 for the whole catalogue. Coverage, width:
vLLM 0.26 on an H200, the boots of ``docs/planner.md``; error: how far the middle of a range lay from the truth, without
and with what the other boots of the same model teach. Exits 1 above an aim or outside a range.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from apps.profiles import fit  # noqa: E402
from apps.profiles.advice import advice  # noqa: E402
from apps.profiles.binding import NumaHost, bind  # noqa: E402
from apps.profiles.placement import DoesNotFit, place  # noqa: E402
from benchmarks._figures import parser  # noqa: E402
from tests.profiles.test_fit_estimate import CATALOGUE, H200, HOMELAB, MEASURED, RIG  # noqa: E402
from tests.profiles.test_placement import rig as rig_facts  # noqa: E402

GIB = 2**30
ONE_PLAN_MS, CATALOGUE_MS = 5.0, 200.0
RIGS = {
    "0-1/2-3": rig_facts((0, 1), (2, 3)),
    "0-2/1-3": rig_facts((0, 2), (1, 3)),
    "one dead bridge": rig_facts((0, 1), (2, 3), dead={(0, 1)}),
}
HOST = NumaHost({0: "0-15", 1: "16-31"}, numactl=True)
LAYOUTS = (fit.Layout(1, 4), fit.Layout(2, 2), fit.Layout(4, 1))


def plan(model: fit.ModelFacts, layout: fit.Layout, facts: object) -> None:
    """What a plan computes once the rows are read."""
    fit.estimate(model, layout, HOMELAB, RIG)
    try:
        placement = place(facts, replicas=layout.replicas, tensor_parallel_size=layout.tensor_parallel_size)
    except DoesNotFit:
        return
    for cards in placement.replicas:
        bind(cards, facts, gpus_per_replica=layout.gpus_per_replica, host=HOST, speaks_nccl=True)
    advice(model, HOMELAB, RIG, facts, (), published_cards=True)


def milliseconds(work: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best * 1000


def times() -> dict[str, float]:
    each = [
        milliseconds(lambda m=model, y=layout: plan(m, y, RIGS["0-1/2-3"]))
        for model in CATALOGUE.values()
        for layout in LAYOUTS
    ]
    whole = {
        f"catalogue of {len(CATALOGUE)} on {name}": milliseconds(
            lambda f=facts: [plan(model, LAYOUTS[0], f) for model in CATALOGUE.values()] and None
        )
        for name, facts in RIGS.items()
    }
    return {"one plan, mean": statistics.mean(each), "one plan, slowest": max(each), **whole}


def boots() -> list[dict[str, object]]:
    """Each measured boot: which of its numbers lay in range, the width of the KV cache's range, the errors."""
    rows = []
    for name, (model, options, weights, activation, graphs, available, tokens) in MEASURED.items():
        found = fit.estimate(model, fit.Layout(), options, H200)
        gpu, boot = found.gpus[0], found.next_boot
        assert boot is not None
        pairs = [
            (gpu.weights, weights * GIB),
            (gpu.activation, activation * GIB),
            (gpu.cuda_graphs, graphs * GIB),
            (boot.available_kv, available * GIB),
        ]
        inside = [r.low - 0.005 * GIB <= truth <= r.high + 0.005 * GIB for r, truth in pairs]
        row: dict[str, object] = {"boot": name, "in range": sum(inside), "of": len(inside)}
        row["width GiB"] = round(boot.available_kv.width / GIB, 2)
        row["KV error GiB"] = round((boot.available_kv.middle / GIB - available), 2)
        if tokens is not None:
            row["of"] = len(inside) + 1
            row["in range"] = sum(inside) + (boot.kv_cache_tokens.low <= tokens <= boot.kv_cache_tokens.high)
        row["KV error GiB, corrected by the others"] = round(corrected(name) - available, 2)
        rows.append(row)
    return rows


def corrected(name: str) -> float:
    """The middle of the KV cache in GiB after the other boots of the same model were learnt from."""
    model, options = MEASURED[name][:2]
    pairs = []
    for other, (its_model, its_options, weights, activation, graphs, _, _) in MEASURED.items():
        if other == name or its_model is not model:
            continue
        said = fit.prediction_of(fit.estimate(model, fit.Layout(), its_options, H200))
        assert said is not None
        facts = fit.BootFacts(
            weights=int(weights * GIB),
            activation=int(activation * GIB),
            cuda_graphs=int(graphs * GIB),
            non_torch=int(0.22 * GIB),
            compiled=said.compiles,
        )
        pairs.append((said, facts))
    found = fit.estimate(model, fit.Layout(), options, replace(H200, correction=fit.correction(pairs)))
    assert found.next_boot is not None
    return found.next_boot.available_kv.middle / GIB


def main() -> int:
    as_json = parser(__doc__).parse_args().json
    took, rows = times(), boots()
    if as_json:
        print(json.dumps({"milliseconds": took, "boots": rows}))
    else:
        for what, value in took.items():
            print(f"{what:40} {value:7.2f} ms")
        print()
        for row in rows:
            wide, off = row["width GiB"], row["KV error GiB"]
            print(
                f"{row['boot']:24} {row['in range']} of {row['of']} in range, KV range {wide:.2f} GiB wide, "
                f"middle {off:+.2f} GiB off, {row['KV error GiB, corrected by the others']:+.2f} corrected"
            )
    slow = took["one plan, slowest"] > ONE_PLAN_MS or any(
        value > CATALOGUE_MS for what, value in took.items() if what.startswith("catalogue")
    )
    return 1 if slow or any(row["in range"] != row["of"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())

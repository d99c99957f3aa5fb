"""Everything a backend computes for some cases, as hashes: equal hashes are bitwise equal results.

``python -m tests.fingerprint BACKEND`` prints them as JSON, for processes with another environment
or under a sanitizer.
"""

import argparse
import hashlib
import json
import sys

import torch

from cbam_fused import backends
from cbam_fused.testing import Gate, run_gate
from tests.cases import BY_NAME, run_id

NAMES = (
    "plain", "odd", "prime", "all_pools", "light_even", "residual_relu", "relu_ties_even", "nan",
    "hw1", "row",
    "many_channels", "single_layer_wide", "long_plane", "stage1", "n1", "n3",
)  # fmt: skip
VARIANTS = (
    (torch.float32, "nchw"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "nchw"),
    (torch.bfloat16, "channels_last"),
    (torch.float16, "nchw"),
    (torch.float64, "channels_last"),
)
RUNS = [(BY_NAME[n], *variant) for n in NAMES if n in BY_NAME for variant in VARIANTS]


def everything(backend: backends.Backend, gate: Gate) -> dict[str, torch.Tensor]:
    """All results of the operations, forward and backward, and of `cbam_inference` where the norm
    is constant.
    """
    results, attended = run_gate(backend, gate)
    results |= attended._asdict()
    if not gate.batch_statistics:
        norm = (gate.norm_weight, gate.norm_bias, gate.running_mean, gate.running_var, gate.eps)
        results["inference"] = backend.cbam_inference(
            gate.x,
            *gate.mlp,
            *gate.conv,
            *norm,
            gate.residual,
            gate.pool,
            gate.maps,
            gate.activation,
        )
    return results


def fingerprint(results: dict[str, torch.Tensor]) -> dict[str, str]:
    """A hash of each result's bytes, in the order of its indices."""
    flat = {name: value.contiguous().flatten().cpu() for name, value in results.items()}
    return {
        name: hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()
        for name, value in flat.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser("tests.fingerprint", description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    torch.set_default_device(options.device)
    backend = backends.get(options.backend)
    hashes = {
        run_id(run): fingerprint(everything(backend, run[0].gate(*run[1:])))
        for run in RUNS
        if run[0].name in options.case
    }
    json.dump(hashes, sys.stdout)


if __name__ == "__main__":
    main()

"""``python -m tests.gpu.processes fork|spawn BACKEND``: a gate in a process started in that way.

Prints the hashes of its results as JSON. The process that starts it has imported the package and
called a gate on the CPU, and has not used CUDA.
"""

import json
import multiprocessing
import sys

import torch

import cbam_fused
from cbam_fused import backends
from tests.calls import call
from tests.cases import BY_NAME
from tests.fingerprint import everything, fingerprint

NAME = "residual_relu"


def hashes(backend: str) -> dict[str, str]:
    """Of a gate on the GPU."""
    with torch.device("cuda"):
        gate = BY_NAME[NAME].gate(torch.bfloat16)
    return fingerprint(everything(backends.get(backend), gate))


def _child(connection, backend: str) -> None:
    connection.send(hashes(backend))


def main(method: str, backend: str) -> None:
    torch.set_num_threads(1)  # a forked process must not meet a pool of threads that it lacks
    call(cbam_fused.cbam, BY_NAME[NAME].gate())
    assert not torch.cuda.is_initialized()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, backend))
    process.start()
    sender.close()
    received = receiver.recv()
    process.join()
    json.dump(received, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

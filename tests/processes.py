"""A function run by several processes of a gloo group, on this machine."""

import tempfile
from collections.abc import Callable

import torch
from torch import distributed, multiprocessing


def run(ranks: int, function: Callable, *arguments: object) -> None:
    """function(rank, *arguments) in each process; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            _process, (ranks, f"file://{folder}/store", function, arguments), ranks
        )


def gathered(value: object) -> list:
    """`value` of every process, in the order of the ranks."""
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _process(rank: int, ranks: int, store: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()

"""Small federations that several tests of dfl train."""

from dataclasses import replace

import torch

from dfl.baselines import build_method
from dfl.data import ClientData, Samples, load_data, skewed
from dfl.federation import Federation
from dfl.train import Config

TOY = Config(clients=3, per_client=40, test_images=60, rounds=2, bank_per_round=None)
"""Three clients of 40 digits: two batches per epoch."""


def federation(config: Config, data=None, **options) -> Federation:
    data = data or load_data(config, config.seed)
    return Federation(build_method(config, data), config, data, **options)


def trained(config: Config, rounds: int = 2, **options) -> Federation:
    made = federation(config, **options)
    for _ in range(rounds):
        made.run_round()
    return made


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def small(side: int):
    """A federation of random images of one size."""
    return skewed(torch.rand(200, side, side), torch.arange(200) % 10, clients=3, per_client=40, test=60)


def with_client(data, k: int, train: Samples):
    clients = list(data.clients)
    clients[k] = ClientData(k, clients[k].name, train, clients[k].test)
    return replace(data, clients=clients)

import torch


class Étage(torch.nn.Linear):
    pass


def build() -> torch.nn.Module:
    return torch.nn.Sequential(Étage(4, 4))

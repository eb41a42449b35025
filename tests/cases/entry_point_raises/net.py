import torch


def Net():
    return torch.nn.Linear(4, "three")

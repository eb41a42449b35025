import torch


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: int):
        return x * n

import torch


class Net(torch.nn.Module):
    def forward(self, x, y):
        return x + y

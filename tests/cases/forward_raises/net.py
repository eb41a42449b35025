import torch


class Net(torch.nn.Module):
    def forward(self, x):
        raise ValueError("no luck today")

import torch


class Net(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] > 2:
            raise ValueError("two rows at most")
        return x + 1

import torch


class Net(torch.nn.Module):
    def forward(self, x):
        length = x.shape[1]
        kept = torch.arange(length) < 0.3 * length
        return (x * kept).sum(1)

import torch


class Net(torch.nn.Module):
    def forward(self, x):
        return x.view(int(x.shape[0]), -1) * 2

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pooling = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.pooling(x)

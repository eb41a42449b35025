import torch


class Net(torch.nn.Linear):
    def __init__(self, wide):
        super().__init__(4, wide)

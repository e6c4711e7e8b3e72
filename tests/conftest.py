"""Tests share a machine, several at a time: one torch thread each."""

import torch

torch.set_num_threads(1)

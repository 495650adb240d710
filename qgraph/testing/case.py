# SPDX-License-Identifier: Apache-2.0
"""A drawn model with its inputs: printed, it is the code that makes it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qgraph.graph.trace import trace

Inputs = tuple[Tensor, ...]


class Recipe(ABC):
    """How to build a model; subclasses are frozen dataclasses, so that they print as code."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, its weights drawn from torch's generator."""

    @abstractmethod
    def inputs(self, batch: int) -> Inputs:
        """Inputs of that many samples."""


@dataclass(frozen=True)
class Case:
    """A model and inputs, the same each time.

    Attributes:
        recipe: of the model.
        seed: of weights and inputs.
        batch: samples per batch.
    """

    recipe: Recipe
    seed: int = 0
    batch: int = 2

    def model(self) -> nn.Module:
        """The model in eval mode; norms have statistics that a wrong fold would expose."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.recipe.build().eval()
            for name, tensor in model.named_buffers():
                if name.endswith("running_mean"):
                    tensor.uniform_(-1, 1)
                elif name.endswith("running_var"):
                    tensor.uniform_(0.5, 2)
        return model

    def inputs(self, number: int = 0) -> Inputs:
        """Batch `number`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * (number + 1) + self.seed)
            return self.recipe.inputs(self.batch)

    def loader(self, batches: int = 2) -> list[Inputs]:
        """Calibration batches; the first is `inputs()`."""
        return [self.inputs(number) for number in range(batches)]

    def graph(self) -> GraphModule:
        """The model traced, as `qgraph.trace` gives it."""
        return trace(self.model(), *self.inputs())

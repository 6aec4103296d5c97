"""CUDA graphs: the kernels of a training step, recorded once and replayed without the host.

The kernels of a small model take less time than the host needs to launch them one by one. A replay
launches all of them at once. It computes what the recorded function computes, by the same kernels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchcam.devices import is_out_of_memory
from batchcam.errors import ConfigError, first_line

WARM_UP = 3
"""Calls of each batch size before its recording, which fill caches and choose kernels."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    chosen_N: Tensor
    losses_L: Tensor
    gradients: tuple[Tensor | None, ...]


class RecordedGradients:
    """A function that leaves gradients in the parameters, recorded for each batch size.

    The first calls of each batch size run as usual. The recordings share one pool of memory.

    Args:
        function: maps the indices of a batch, int64 `(N,)`, to its losses. It replaces the
            gradients of `parameters`, reads no value of a tensor, and has no shape that depends on
            values.
        parameters: what the function computes gradients of.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter]
    ) -> None:
        self._function = function
        self._parameters = tuple(parameters)
        self._calls: dict[int, int] = {}
        self._recordings: dict[int, _Recording] = {}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, chosen_N: Tensor) -> Tensor:
        """Return the losses of a batch, valid until the next call.

        Raises:
            ConfigError: the function cannot be recorded.
        """
        size = len(chosen_N)
        if size not in self._recordings:
            calls = self._calls[size] = self._calls.get(size, 0) + 1
            if calls <= WARM_UP:
                return self._aside(chosen_N)
            self._recordings[size] = self._record(chosen_N)
        recording = self._recordings[size]
        recording.chosen_N.copy_(chosen_N)
        recording.graph.replay()
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.losses_L

    def _aside(self, chosen_N: Tensor) -> Tensor:
        """Call the function on the stream of the recordings."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses_L = self._function(chosen_N)
        current.wait_stream(self._stream)
        return losses_L

    def _record(self, chosen_N: Tensor) -> _Recording:
        graph, chosen_N = torch.cuda.CUDAGraph(), chosen_N.clone()
        for parameter in self._parameters:
            parameter.grad = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                losses_L = self._function(chosen_N)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"cuda_graphs=True: this training step cannot be recorded as a CUDA graph "
                f"({first_line(error)}); set cuda_graphs to False (--no-cuda-graphs)."
            ) from error
        gradients = tuple(parameter.grad for parameter in self._parameters)
        return _Recording(graph, chosen_N, losses_L, gradients)

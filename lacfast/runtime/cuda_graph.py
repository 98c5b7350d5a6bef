"""Capture in CUDA graphs: one pool and one side stream for all graphs of an owner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from lacfast.runtime.failures import FailedError


class CudaGraph(torch.cuda.CUDAGraph):
    """A captured graph that knows its memory."""

    num_bytes = 0
    """Bytes that the capture added to its pool."""


class CudaCapture:
    """One pool and one side stream for all captures of a runner."""

    def __init__(self, device: torch.device) -> None:
        # One without an index is the current one today, and may be another tomorrow.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Within the context work goes to the side stream, after what was queued before it.

        Warm-up belongs there: cuBLAS keeps a workspace per stream, which must not be made in a graph's pool.
        """
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            self.stream.wait_stream(outer)
            with torch.cuda.stream(self.stream):
                yield
            outer.wait_stream(self.stream)

    def capture(self, run: Callable[[], None]) -> CudaGraph:
        """
        Raises:
            OutOfMemoryError: when memory ran out within it.
            RuntimeError: for a step that cannot be captured.
            FailedError: when torch's generator has not survived that, so that eager steps fail too.
        """
        graph = CudaGraph()
        held = self._pool_bytes()
        drawn = torch.cuda.default_generators[self.device.index].clone_state()
        # The outer context gives the stream back where the inner one, whose capture failed, does not.
        with self.side_stream():
            try:
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    run()
            except BaseException as error:
                self._abandon(graph)
                self._end_capture_of_draws(drawn, error)
                shortage = _shortage(error)
                if shortage is not None:
                    raise shortage from None
                raise
        graph.num_bytes = self._pool_bytes() - held
        return graph

    def _end_capture_of_draws(self, drawn: torch.Generator, cause: BaseException) -> None:
        """Give torch's generator the state from before a failed capture, and prove that it draws.

        Its own may still be that of a capture, in which every later draw would be refused.
        """
        generator = torch.cuda.default_generators[self.device.index]
        # The proof draws from a copy, so that it leaves no trace.
        generator.graphsafe_set_state(drawn.clone_state())
        try:
            torch.rand((), device=self.device)
        except RuntimeError as error:
            raise FailedError(
                f"torch's generator of {self.device} refuses to draw ({error}) after a capture that failed "
                f"({cause}); start the run again with graph.mode='off', it goes on from its checkpoint"
            ) from cause
        generator.graphsafe_set_state(drawn)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave a pool whose capture failed: the allocator may still believe that it goes on.

        The graph stays alive, for the allocator then still asks it which streams are captured.
        """
        graph.reset()
        self._failed.append(graph)
        with contextlib.suppress(RuntimeError):
            # Refused where the capture did end, and then there is nothing to do.
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()

    def _pool_bytes(self) -> int:
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            if tuple(segment["segment_pool_id"]) == tuple(self.pool)
        )


def _shortage(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory that ended a capture: what is raised last may be that it could not be ended."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error

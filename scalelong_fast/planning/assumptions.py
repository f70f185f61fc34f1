"""What the planner takes for granted, each with where it is from."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Assumptions:
    """Figures that are no property of the network.

    Attributes:
        product_share: of the peak rate that large matrix products reach; noted of an H200, see :meth:`describe`, with
            no result file to show it.
        bandwidth_share: of the peak bandwidth that large copies reach; noted in the same way.
        link_share: of a link's peak that large collectives reach.
        kernel_seconds: shortest time of a kernel.
        compiled_pointwise: share of the bytes and kernels of elementwise operators that is left when they are compiled.
        overlap: share of the forward or backward beside which an exchange can run.
        collective_seconds: fixed time of a collective.
        hop_seconds: from one GPU to the next; an all-gather or reduce-scatter goes round the ring of all of them, an
            all-reduce up and down a tree.
        context: bytes of the CUDA context, the libraries' workspaces and NCCL's buffers.
        fragmentation: of the allocator, a share of what is allocated.
        bucket: bytes of a gradient bucket of DDP.
    """

    product_share: float = 0.80
    bandwidth_share: float = 0.90
    link_share: float = 0.80
    kernel_seconds: float = 4e-6
    compiled_pointwise: float = 0.5
    overlap: float = 0.9
    collective_seconds: float = 20e-6
    hop_seconds: float = 3e-6
    context: int = 1536 * MIB
    fragmentation: float = 0.05
    bucket: int = 25 * MIB

    def describe(self) -> list[tuple[str, str, str]]:
        """(what, value, source) of each."""
        return [
            (
                "matrix products reach",
                f"{self.product_share:.0%} of the peak",
                "noted of an H200: 790 TFLOP/s, 8192³ in bf16",
            ),
            ("copies reach", f"{self.bandwidth_share:.0%} of the bandwidth", "noted of an H200: 4.3 TB/s"),
            ("collectives reach", f"{self.link_share:.0%} of the link", "assumed"),
            ("a kernel takes at least", f"{self.kernel_seconds * 1e6:g} µs", "assumed"),
            ("compiling leaves", f"{self.compiled_pointwise:.0%} of elementwise bytes and kernels", "assumed"),
            ("exchanges run beside", f"{self.overlap:.0%} of forward and backward", "assumed"),
            ("a collective takes at least", f"{self.collective_seconds * 1e6:g} µs", "assumed"),
            ("and from GPU to GPU", f"{self.hop_seconds * 1e6:g} µs", "assumed"),
            ("context and libraries", f"{self.context / 2**30:.1f} GiB", "assumed"),
            ("fragmentation", f"{self.fragmentation:.0%} of what is allocated", "assumed"),
            ("a bucket of DDP holds", f"{self.bucket / MIB:g} MiB", "PyTorch's default"),
        ]

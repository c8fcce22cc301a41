"""Whether a command that failed ran out of device memory, by the end of its output."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.device_memory import TAIL_BYTES, ran_out

TORCH = (
    "Traceback (most recent call last):\n"
    '  File "/workspace/code/train.py", line 30, in <module>\n'
    "    loss = model(x).sum()\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.75 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 8.55 GiB memory in use.\n"
)


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.80 GiB total capacity)",
        "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 132.00 MiB. GPU 3 has a total capacity",
        "RuntimeError: CUDA out of memory. Tried to allocate 1024.00 MiB (GPU 0; 15.90 GiB total capacity;",
        "RuntimeError: CUDA error: out of memory",
        "\x1b[31mtorch.OutOfMemoryError\x1b[0m: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "numba.cuda.cudadrv.driver.CudaAPIError: [2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY",
        "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 47703 bytes.",
        "XlaRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0",
        "tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when allocating tensor with shape[64,512] "
        "and type float on /job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc",
        "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,000,000,000 bytes (allocated so far: 0 bytes).",
        "E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4480.00 MiB on device 0: cudaMalloc failed: out of "
        "memory",
        "ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
    ],
)
def test_what_libraries_print_when_the_device_is_full_is_recognized(line: str) -> None:
    assert ran_out(f"epoch 1\n{line}\n".encode())


def test_a_traceback_of_pytorch_is_recognized_with_what_launchers_add() -> None:
    launcher = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "============================================================\ntrain.py FAILED\n"
    )
    assert ran_out(TORCH.encode())
    assert ran_out((TORCH + launcher).encode())
    assert ran_out(TORCH.replace("\n", "\r\n").encode())


def test_an_exception_that_was_raised_because_of_it_hides_nothing() -> None:
    chained = "\nDuring handling of the above exception, another exception occurred:\n\nRuntimeError: could not train\n"
    assert ran_out((TORCH + chained).encode())


def test_a_command_that_got_over_it_and_died_of_something_else_did_not_run_out() -> None:
    assert not ran_out((TORCH + "retrying with batch 32\nepoch 1\nKeyError: 'label'\n").encode())
    assert not ran_out((TORCH + "FileNotFoundError: [Errno 2] No such file or directory: 'x'\n").encode())


TOLD = "batch 64: CUDA out of memory. Tried to allocate 2.00 GiB; trying 32\nepoch 1\n"
ELSEWHERE = 'Traceback (most recent call last):\n  File "t.py", line 3, in <module>\n    x()\n'


@pytest.mark.parametrize(
    "end",
    [
        ELSEWHERE + "trainer.Diverged: loss is nan\n",
        ELSEWHERE + "StopIteration\n",
        "Segmentation fault (core dumped)\n",
        "terminate called after throwing an instance of 'std::bad_alloc'\n",
        "accuracy 0.31 is below the target 0.9\n",
        "train.py: error: no checkpoint\n",
    ],
)
def test_a_command_that_told_of_it_and_went_on_did_not_run_out(end: str) -> None:
    assert not ran_out((TOLD + end).encode())


@pytest.mark.parametrize(
    "end", [ELSEWHERE + "trainer.Diverged: loss is nan\n", "Segmentation fault (core dumped)\n", "Killed\n"]
)
def test_nor_did_one_that_printed_the_whole_traceback(end: str) -> None:
    assert not ran_out((TORCH + "trying 32\n" + end).encode())


def test_what_is_ignored_on_the_way_out_hides_nothing() -> None:
    ignored = "Exception ignored in: <function Loader.__del__ at 0x7f>\n" + ELSEWHERE + "AttributeError: no workers\n"
    assert ran_out((TORCH + ignored).encode())
    assert not ran_out((TORCH + ignored + ELSEWHERE + "KeyError: 1\n").encode())


def test_ranks_that_fail_because_another_ran_out_hide_nothing() -> None:
    first = "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    second = '[rank1]: Traceback (most recent call last):\n[rank1]:   File "t.py"\n[rank1]: torch.distributed.'
    assert ran_out((first + second + "DistBackendError: NCCL error: remote process exited\n").encode())
    assert not ran_out((first + second.replace("rank1", "rank0") + "DistBackendError: NCCL error\n").encode())


def test_one_who_catches_it_and_tells_it_last_ran_out() -> None:
    assert ran_out(b"epoch 1\nfailed: CUDA out of memory. Tried to allocate 2.00 GiB\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Killed\n",
        "MemoryError\n",
        "terminate called after throwing an instance of 'std::bad_alloc'\n",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)\n",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB for an array\n",
        "W external/xla/xla/tsl/framework/bfc_allocator.cc:310] Allocator (GPU_0_bfc) ran out of memory trying to "
        "allocate 3.37GiB with freed_by_count=0. The caller indicates that this is not a failure, but this may mean "
        "that there could be performance gains if more memory were available.\n",
        "to avoid CUDA out of memory errors, lower --batch-size\nValueError: bad argument\n",
        "    except torch.OutOfMemoryError:\n",
        "OOM when allocating tensor with shape[64] and type float on /job:localhost/task:0/device:CPU:0 by allocator\n",
        "RuntimeError: CUDA error: device-side assert triggered\n",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`\n",
        "OSError: [Errno 28] No space left on device\n",
    ],
)
def test_what_is_something_else_is_not_taken_for_it(text: str) -> None:
    assert not ran_out(text.encode())


def test_only_the_end_of_the_output_counts() -> None:
    assert not ran_out(TORCH.encode() + b"x\n" * TAIL_BYTES)


@given(st.binary(max_size=500), st.binary(max_size=100))
def test_any_bytes_are_borne(before: bytes, after: bytes) -> None:
    assert ran_out(before) in (True, False)
    assert ran_out(before + b"\n" + TORCH.encode())
    assert ran_out(TORCH.encode() + after) in (True, False)

"""Control flow, launches, and what a kernel tells people when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from treespec_cpu_host.triton_backend import ir, kernel, launch, toolchain


@triton.jit
def loops(out_ptr, start, end, step, SIZE: tl.constexpr):
    numbers = tl.arange(0, SIZE)
    first, second = numbers, numbers * 10
    count = 0
    for at in range(start, end, step):
        first, second = second, first + at  # each needs the other's old value
        count += 1
        if at == 3:
            first += 1000
        else:
            second -= 1
    while count > 2:
        inner = 0
        while inner < count:
            inner += 2
        count -= inner // 2
    tl.store(out_ptr + numbers, first)
    tl.store(out_ptr + SIZE + numbers, second)
    tl.store(out_ptr + 2 * SIZE, count)


def expected_loops(start: int, end: int, step: int, size: int) -> list[int]:
    first, second = torch.arange(size), torch.arange(size) * 10
    count = 0
    for at in range(start, end, step):
        first, second = second, first + at
        count += 1
        first, second = (first + 1000, second) if at == 3 else (first, second - 1)
    while count > 2:
        inner = 0
        while inner < count:
            inner += 2
        count -= inner // 2
    return [*first.tolist(), *second.tolist(), count]


@pytest.mark.parametrize("bounds", [(0, 7, 1), (0, 0, 1), (3, 4, 1), (-2, 9, 3), (5, 2, 1)])  # fmt: skip
@pytest.mark.parametrize("size", [4, 8192])
def test_loops_carry_what_they_should(bounds: tuple[int, int, int], size: int):
    out = torch.zeros(2 * size + 1, dtype=torch.int64)
    loops[(1,)](out, *bounds, size)
    assert out.tolist() == expected_loops(*bounds, size)


@triton.jit
def early(out_ptr, num):
    at = tl.program_id(0)
    if at >= num:
        return
    value = at * 2 if at % 2 == 0 else -at
    tl.store(out_ptr + at, value)


def test_programs_may_return_early():
    out = torch.full((6,), 99)
    early[(6,)](out, 4)
    assert out.tolist() == [0, -1, 4, -3, 99, 99]


@triton.jit
def grid(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + at, x + 10 * y + 100 * z)


def test_every_program_of_a_grid_runs_once():
    out = torch.full((2, 3, 5), -1)
    grid[(5, 3, 2)](out)
    x, y, z = torch.arange(5), torch.arange(3)[:, None], torch.arange(2)[:, None, None]
    assert torch.equal(out, x + 10 * y + 100 * z)
    grid[(0, 3, 2)](out.fill_(-1))
    assert (out == -1).all()


@triton.jit
def arguments(out_ptr, i, long, f, flag, nothing, CONSTANT: tl.constexpr):
    tl.store(out_ptr, i)
    tl.store(out_ptr + 1, long)
    tl.store(out_ptr + 2, f)
    tl.store(out_ptr + 3, flag)
    tl.store(out_ptr + 4, CONSTANT if nothing is None else 0)


def test_arguments_of_every_kind():
    out = torch.zeros(5, dtype=torch.float64)
    arguments[(1,)](out, -3, 1 << 40, 0.5, True, None, 7)
    assert out.tolist() == [-3, 1 << 40, 0.5, 1, 7]
    arguments[(1,)](out, 1, -(1 << 40), float("-inf"), False, None, 7)
    assert out.tolist() == [1, -(1 << 40), float("-inf"), 0, 7]


@triton.jit
def slow(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    for _ in range(20):
        x = tl.sin(tl.cumsum(x, 0))
    tl.store(out_ptr + at, x)
    tl.atomic_add(out_ptr + SIZE * tl.num_programs(0), 1.0)


def test_threads_share_a_grid_and_agree_with_one():
    size, programs = 8192, 24
    x = torch.randn(size * programs)
    outs = [torch.zeros(size * programs + 1) for _ in range(2)]
    before = torch.get_num_threads()
    for out, threads in zip(outs, (1, 2), strict=True):
        torch.set_num_threads(threads)
        slow[(programs,)](x, out, size)
    torch.set_num_threads(before)
    assert torch.equal(*outs)
    assert outs[0][-1] == programs


@triton.jit
def asserts(x_ptr, num, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < num, other=0)
    tl.device_assert(x < 5, 'an "x" of 100% is too large')


def test_an_assert_names_the_kernel_the_line_and_what_it_says():
    asserts[(1,)](torch.arange(5), 5, 8)
    line = asserts.starting_line_number + 4
    with pytest.raises(AssertionError) as caught:
        asserts[(1,)](torch.arange(6), 6, 8)
    assert str(caught.value).startswith("asserts, ")
    assert f'{Path(__file__).name}:{line}: an "x" of 100% is too large' in str(caught.value)  # fmt: skip
    asserts[(1,)](torch.arange(6), 5, 8)  # the process goes on


@triton.jit
def prints(x_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.device_print("100% x", x, x.to(tl.float32) / 2)


def test_prints_show_every_element(capfd: pytest.CaptureFixture[str]):
    prints[(1,)](torch.tensor([-3, 4]), 2)
    printed = capfd.readouterr().out.splitlines()
    assert [each.split()[-1] for each in printed] == ["-3", "4", "-1.500000", "2.000000"]  # fmt: skip
    assert printed[1].startswith("pid (0, 0, 0) idx (1) 100% x:")


UNKNOWN = """
module {
  tt.func public @mine(%p: !tt.ptr<f32> loc(#loc)) attributes {noinline = false} {
    %x = tt.load %p : !tt.ptr<f32> loc(#loc2)
    %y = OPERATION %x : f32 loc(#loc2)
    tt.store %p, %y : !tt.ptr<f32> loc(#loc2)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
#loc = loc("mine.py":1:1)
#loc1 = loc("mine.py":7:3)
#loc2 = loc("y"(#loc1))
"""


@pytest.mark.parametrize("name", ["math.lgamma", "tt.elementwise_inline_asm"])
def test_an_unknown_operation_is_named_with_kernel_and_line(name: str):
    with pytest.raises(ir.UnknownOperation, match=rf"mine, mine.py:7: {name}: "):
        kernel.source(ir.parse(UNKNOWN.replace("OPERATION", name)))


def test_an_unknown_type_is_named():
    text = UNKNOWN.replace("f32", "f8E4M3FNUZ").replace("OPERATION", "arith.negf")
    with pytest.raises(ir.UnknownOperation, match=r"mine.py:7: .*f8E4M3FNUZ"):
        kernel.source(ir.parse(text))


MACHINES = [
    ("-march=x86-64",),
    ("-march=x86-64-v2",),
    ("-march=x86-64-v3",),
    ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    toolchain.NATIVE,
]


@pytest.mark.parametrize("machine", MACHINES, ids=" ".join)
def test_every_machine_gets_its_own_code(machine: tuple[str, ...]):
    found = toolchain.find()
    tools = toolchain.Toolchain(found.command, machine)
    text = UNKNOWN.replace("OPERATION", "math.exp")
    library = tools.library("mine", kernel.source(ir.parse(text)))
    assert library.startswith(b"\x7fELF")
    others = {toolchain.Toolchain(found.command, each).version for each in MACHINES}
    assert len(others) == len(MACHINES), "a cache would mix up their libraries"
    if "v4" in machine[0]:
        return  # may not run here
    x = torch.tensor([0.5])
    _, function = launch.load(library)
    function(launch.struct.pack("iiiP", 1, 1, 1, x.data_ptr()), None, 1)
    torch.testing.assert_close(x, torch.tensor([0.5]).exp())


def test_the_same_kernel_is_the_same_c_every_time():
    text = UNKNOWN.replace("OPERATION", "math.exp")
    assert kernel.source(ir.parse(text)) == kernel.source(ir.parse(text))


WITHOUT = """
import torch
import treespec_cpu_host
treespec_cpu_host.repair_interpreter()
import sys; sys.path.insert(0, {tests!r})
from host_kernels import unary
import triton, triton.language as tl
@triton.jit
def double(x):
    return x * 2
out = torch.zeros(5)
unary[(1,)](torch.arange(5.0), out, 5, double, 8)
print(type(unary).__name__, out.tolist())
"""


def test_without_a_c_compiler_the_interpreter_takes_over_and_says_so_once(
    tmp_path: Path,
):
    env = {key: each for key, each in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"CC": "no-such-compiler", "TRITON_CACHE_DIR": str(tmp_path)}
    script = WITHOUT.format(tests=str(Path(__file__).parent))
    # A file, because Triton reads the source of kernels.
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "InterpretedFunction [0.0, 2.0, 4.0, 6.0, 8.0]\n"
    assert done.stderr.count("found no C compiler") == 1

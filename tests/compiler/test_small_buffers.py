"""Small results of compiled programs need no tensor."""

import pytest
import torch
from torch import Tensor

import fdl
from fdl._compiler import _small_buffers
from fdl._compiler._small_buffers import HEADER, LARGEST, on_the_stack
from fdl._torch_compat import RELEASE


def allocation(name: str, sizes: str = "int_array_1", dtype: str = "float32") -> str:
    return (
        f"    AtenTensorHandle {name}_handle;\n"
        f"    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, {sizes}, int_array_0, "
        f"cached_torch_dtype_{dtype}, cached_torch_device_type_cpu,  0, &{name}_handle));\n"
        f"    RAIIAtenTensorHandle {name}({name}_handle);\n"
    )


def program(*lines: str, size: int = 10) -> str:
    arrays = (
        "static constexpr int64_t int_array_0[] = {1L, };\n"
        f"static constexpr int64_t int_array_1[] = {{{size}L, }};\n"
    )
    return HEADER + arrays + "".join(lines)


def kernel(name: str) -> str:
    return f"    cpp_fused_0((float*)({name}.data_ptr()));\n    {name}.reset();\n"


def test_what_only_kernels_use_is_on_the_stack() -> None:
    code = on_the_stack(program(allocation("buf1"), kernel("buf1")))
    assert "unsigned char buf1_memory[40]" in code and "empty_strided" not in code
    assert "struct SmallBuffer" in code and kernel("buf1") in code


@pytest.mark.parametrize(
    "use",
    [
        "    output_handles[0] = buf1.release();\n",
        "    buf9 = std::move(buf1);\n",
        "    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_item_bool(buf1, &flag));\n",
        "    auto buf2 = std::move(buf1);  // reuse\n    output_handles[0] = buf2.release();\n",
        "    auto buf2 = wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper("
        "buf1, 1, int_array_1, int_array_0, 3L));\n    f(buf2);\n",
    ],
)
def test_a_tensor_that_is_used_otherwise_stays(use: str) -> None:
    code = program(allocation("buf1"), kernel("buf1"), use)
    assert on_the_stack(code) == code


def test_names_for_the_same_memory() -> None:
    view = (
        "    auto buf3 = wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper("
        "buf2, 1, int_array_1, int_array_0, 3L));\n"
    )
    moved = "    auto buf2 = std::move(buf1);  // reuse\n"
    code = on_the_stack(program(allocation("buf1"), moved, view, kernel("buf3"), kernel("buf2")))
    assert "SmallBuffer buf3{static_cast<char*>(buf2.data_ptr()) + 12};" in code
    assert moved in code and "empty_strided" not in code


def test_a_directive_stays_at_the_beginning_of_its_line() -> None:
    code = program(allocation("buf1"), kernel("buf1")).replace(HEADER, HEADER + "#if 1\n#endif\n")
    assert "\n#if 1\n" in on_the_stack(code)


def test_large_results_and_many_stay() -> None:
    large = program(allocation("buf1"), kernel("buf1"), size=LARGEST // 4 + 1)
    assert on_the_stack(large) == large
    names = [f"buf{i}" for i in range(40)]
    many = on_the_stack(program(*map(allocation, names), *map(kernel, names), size=LARGEST // 4))
    assert many.count("_memory[") == _small_buffers.MOST // LARGEST < many.count("empty_strided(")


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < (2, 12), reason="torch 2.11 calls kernels of loops from Python")
def test_a_loop_of_tiny_steps_allocates_only_what_it_carries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []

    def recorded(code: str) -> str:
        written.append(on_the_stack(code))
        return written[-1]

    monkeypatch.setattr(_small_buffers, "on_the_stack", recorded)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.randn(40, generator=generator)
    order = torch.randperm(40, generator=generator).view(20, 2).repeat(5, 1)

    def step(w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        def loss(w: Tensor) -> Tensor:
            return ((x[i] @ w - y[i]) ** 2).mean()

        gradient, value = torch.func.grad_and_value(loss)(w)
        return w - 0.1 * gradient, value

    def epoch(w: Tensor) -> tuple[Tensor, Tensor]:
        return fdl.scan(step, w, order)

    got, expected = fdl.jit(epoch, strict=True)(torch.zeros(3)), epoch(torch.zeros(3))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (code,) = [code for code in written if "while (1)" in code]
    body = code[code.index("subgraph: while_loop_body") :]
    assert body.count("aoti_torch_empty_strided") <= 3 < body.count("SmallBuffer")

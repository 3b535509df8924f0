// Elementwise maths of the tensors of many leaves, in one pass over each of them.
//
// The operations are those of torch that `fdl/optim/_one_pass.py` names: each rounds as torch's own
// kernel does, so the results have the same bits. What lies between them stays in the cache.

#pragma once

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include "objects.h"

#if defined(__linux__) && defined(__x86_64__)
extern "C" {  // of MKL
__attribute__((weak)) void vmsSqrt(int, const float*, float*, long long);
__attribute__((weak)) void vmdSqrt(int, const double*, double*, long long);
}
#else
constexpr void (*vmsSqrt)(int, const float*, float*, long long) = nullptr;
constexpr void (*vmdSqrt)(int, const double*, double*, long long) = nullptr;
#endif

namespace {

constexpr long long MKL_MODE = 0x140102;  // torch's: high accuracy, subnormal numbers, no errors
constexpr int64_t BLOCK = 512;  // elements that are computed at a time
constexpr int64_t ALONE = 64;   // blocks below which one thread computes

// Square roots as torch computes them: by MKL where it is a part of torch, which may be off in the
// last digit, and whose function is another one during its first call.
void square_roots(const float* x, float* roots, int n) {
    if (!vmsSqrt) for (int i = 0; i < n; ++i) roots[i] = std::sqrt(x[i]);
    else vmsSqrt(n, x, roots, MKL_MODE);
}
void square_roots(const double* x, double* roots, int n) {
    if (!vmdSqrt) for (int i = 0; i < n; ++i) roots[i] = std::sqrt(x[i]);
    else vmdSqrt(n, x, roots, MKL_MODE);
}

// Let the first call of MKL be one that no other thread makes at the same time.
void begin_square_roots() {
    float x = 1, root;
    double wide_x = 1, wide_root;
    square_roots(&x, &root, 1);
    square_roots(&wide_x, &wide_root, 1);
}

struct Maths {
    std::string_view symbols;      // of the operations
    std::vector<size_t> operands;  // two of each; values: arguments, scalars, then operations
    std::vector<size_t> results;   // values
    size_t arguments;
    at::ScalarType dtype;
};

template <typename T>
void operate(char symbol, const T* a, const T* b, T* __restrict out, int64_t n) {
    switch (symbol) {
        case '+': for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i]; return;
        case '-': for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i]; return;
        case '*': for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i]; return;
        case '/': for (int64_t i = 0; i < n; ++i) out[i] = a[i] / b[i]; return;
        case 'n': for (int64_t i = 0; i < n; ++i) out[i] = -a[i]; return;
        case 'a': for (int64_t i = 0; i < n; ++i) out[i] = std::fabs(a[i]); return;
        case 's': for (int64_t i = 0; i < n; ++i) out[i] = T(a[i] > 0) - T(a[i] < 0); return;
        case 'q': square_roots(a, out, n); return;
        case 'r':  // of a negative number and of -0.0 it is 0.0
            T above[BLOCK];
            for (int64_t i = 0; i < n; ++i) above[i] = a[i] < 0 ? T(0) : a[i];
            square_roots(above, out, n);
            for (int64_t i = 0; i < n; ++i) out[i] = std::fabs(out[i]);
            return;
    }
}

bool is_known(char symbol) {
    return std::string_view("+-*/nasqr").find(symbol) != std::string_view::npos;
}

struct Leaf {
    std::vector<const void*> arguments;
    std::vector<void*> results;
    int64_t size, before;  // elements; blocks of the leaves before it
};

template <typename T>
void compute_all(const Maths& maths, const std::vector<Leaf>& leaves,
                 const std::vector<TensorImpl*>& scalars, int64_t blocks) {
    const size_t first = maths.arguments + scalars.size();  // of the values that are computed
    const size_t operations = maths.symbols.size();
    auto part = [&](int64_t begin, int64_t end) {
        std::vector<T> memory((scalars.size() + operations) * BLOCK);
        std::vector<const T*> values(first + operations);  // of a block
        std::vector<T*> computed(operations);
        for (size_t i = 0; i < scalars.size(); ++i) {
            T* repeated = memory.data() + i * BLOCK;
            std::fill_n(repeated, BLOCK, *static_cast<const T*>(scalars[i]->data()));
            values[maths.arguments + i] = repeated;
        }
        for (size_t i = 0; i < operations; ++i) {
            values[first + i] = computed[i] = memory.data() + (scalars.size() + i) * BLOCK;
        }
        auto after = [](int64_t block, const Leaf& leaf) { return block < leaf.before; };
        auto leaf = std::upper_bound(leaves.begin(), leaves.end(), begin, after) - 1;
        for (int64_t block = begin; block < end; ++block) {
            while ((block - leaf->before) * BLOCK >= leaf->size) ++leaf;
            const int64_t offset = (block - leaf->before) * BLOCK;
            for (size_t i = 0; i < maths.arguments; ++i) {
                values[i] = static_cast<const T*>(leaf->arguments[i]) + offset;
            }
            for (size_t i = 0; i < maths.results.size(); ++i) {
                const size_t place = maths.results[i];
                values[place] = computed[place - first] =
                    static_cast<T*>(leaf->results[i]) + offset;
            }
            for (size_t i = 0; i < operations; ++i) {
                const T *a = values[maths.operands[2 * i]], *b = values[maths.operands[2 * i + 1]];
                operate<T>(maths.symbols[i], a, b, computed[i],
                           std::min(BLOCK, leaf->size - offset));
            }
        }
    };
    if (blocks) at::parallel_for(0, blocks, ALONE, part);
}

// Check for memory of a CPU that holds the elements in order, and nothing that acts on operations.
bool is_ordinary(TensorImpl* x, at::ScalarType dtype) {
    static const auto usual = c10::DispatchKeySet(c10::DispatchKey::CPU) |
        c10::getAutogradRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
        c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit);
    if (x->dtype() != dtype || !x->key_set().has(c10::DispatchKey::CPU)) return false;
    if ((x->key_set() | usual) != usual || !x->has_storage()) return false;
    if (x->requires_grad() && c10::GradMode::is_enabled()) return false;
    int64_t stride = 1;
    for (int64_t axis = x->dim() - 1; axis >= 0; --axis) {
        if (x->stride(axis) != stride) return false;
        stride *= std::max<int64_t>(x->size(axis), 1);
    }
    return true;
}

// Return the tensors of each result for all leaves, or nothing if the columns, a list of tensors for
// each argument, are not ordinary tensors of one dtype.
Object elementwise(Maths& maths, PyObject* scalars, PyObject* columns) {
    maths.arguments = PyList_GET_SIZE(columns);
    PyObject* column = PyList_GET_ITEM(columns, 0);
    PyObject* first = PyList_GET_ITEM(column, 0);
    if (!is_tensor(first)) return Object();
    maths.dtype = at::typeMetaToScalarType(impl_of(first)->dtype());
    if (maths.dtype != at::kFloat && maths.dtype != at::kDouble) return Object();
    for (char symbol : maths.symbols) if (!is_known(symbol)) return Object();

    std::vector<TensorImpl*> constants;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(scalars); ++i) {
        constants.push_back(impl_of(PyList_GET_ITEM(scalars, i)));
        if (!is_ordinary(constants.back(), maths.dtype)) return Object();
    }
    std::vector<Leaf> leaves;
    std::vector<Impl> outputs;  // result by result, of each leaf
    int64_t blocks = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(column); ++i) {
        Leaf leaf;
        c10::IntArrayRef sizes;
        for (size_t j = 0; j < maths.arguments; ++j) {
            PyObject* tensor = PyList_GET_ITEM(PyList_GET_ITEM(columns, j), i);
            if (!is_tensor(tensor) || !is_ordinary(impl_of(tensor), maths.dtype)) return Object();
            if (j == 0) sizes = impl_of(tensor)->sizes();
            if (sizes.empty() || impl_of(tensor)->sizes() != sizes) return Object();
            leaf.arguments.push_back(impl_of(tensor)->data());
        }
        for (size_t j = 0; j < maths.results.size(); ++j) {
            at::TensorBase output = at::detail::empty_cpu(sizes, maths.dtype);
            leaf.results.push_back(output.mutable_data_ptr());
            outputs.push_back(share(output.unsafeGetTensorImpl()));
        }
        leaf.size = impl_of(PyList_GET_ITEM(column, i))->numel();
        leaf.before = blocks;
        blocks += (leaf.size + BLOCK - 1) / BLOCK;
        leaves.push_back(std::move(leaf));
    }
    Py_BEGIN_ALLOW_THREADS
    if (maths.dtype == at::kFloat) {
        compute_all<float>(maths, leaves, constants, blocks);
    } else {
        compute_all<double>(maths, leaves, constants, blocks);
    }
    Py_END_ALLOW_THREADS

    Object lists(checked(PyList_New(maths.results.size())));
    for (size_t j = 0; j < maths.results.size(); ++j) {
        PyObject* list = checked(PyList_New(leaves.size()));
        PyList_SET_ITEM(lists.ptr, j, list);
        for (size_t i = 0; i < leaves.size(); ++i) {
            PyList_SET_ITEM(list, i, wrap(std::move(outputs[i * maths.results.size() + j])));
        }
    }
    return lists;
}

}  // namespace
